"""InternVL-2 models of the code beside their checkpoints, whose decoder is a Qwen2 or a LLaMA."""

from __future__ import annotations

from typing import Any

from atp_patch.contract import GridQuery, Outer
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.families.base import Family, Grids, square_grids

BACKBONES = ("qwen2", "llama")
MEND = (
    "Load the checkpoint whose name ends in -hf, or convert one with a Qwen2 or LLaMA backbone: "
    "python -m atp_patch.convert internvl FOLDER OUT."
)


def _side(config: Any) -> int:
    vision = config.vision_config
    size = int(getattr(config, "force_image_size", None) or vision.image_size)
    return round(size // int(vision.patch_size) * config.downsample_ratio)


def _grids(query: GridQuery) -> Grids:
    side = _side(query.config)
    return [square_grids(spans, side) for spans in query.spans]


def _check(config: Any) -> None:
    backbone = getattr(config.llm_config, "model_type", None)
    if backbone not in BACKBONES:
        raise UnsupportedModelError(
            f"the language model of this InternVL-2 is of type {backbone!r}, whose own code knows "
            f"neither transformers' caches nor its attention interface. {MEND}"
        )


INTERNVL_CHAT = Family(
    name="internvl_chat",
    model_types=("internvl_chat",),
    grids=_grids,
    token_ids=(),
    check=_check,
    outer=Outer(decoder="language_model", image_token="img_context_token_id", mend=MEND),
    layout="one square a tile",
)
