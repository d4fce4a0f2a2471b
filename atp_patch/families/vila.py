"""VILA-1.5 and NVILA models of their own package, whose language model is given embeddings.

``_embed`` puts each image's features, and behind them the embeddings of the encoder's closing
tokens, in the place of one id of the prompt. Images may follow each other without text between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from atp_patch.contract import GridQuery, Outer, Span, VisualGrid
from atp_patch.contract.errors import InputError, UnsupportedModelError
from atp_patch.families.base import Family, Grids

# mm_projector_type -> how many patches along a side become one token.
DOWNSAMPLING = {
    "linear": 1,
    "mlp2x_gelu": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}


def _part(config: Any, name: str) -> Mapping[str, Any]:
    """Return a part of the config, which holds it as a mapping or as a config of its own."""
    part: Any = getattr(config, name, None)
    if isinstance(part, Mapping):
        return part
    return part.to_dict() if hasattr(part, "to_dict") else {}


def _side(config: Any) -> int:
    """Return how many visual tokens lie along a side of one image."""
    tower, projector = _part(config, "vision_tower_cfg"), _part(config, "mm_projector_cfg")
    patches = int(tower["image_size"]) // int(tower["patch_size"])
    return math.ceil(patches / DOWNSAMPLING[projector["mm_projector_type"]])


def _images(span: Span, side: int) -> list[VisualGrid]:
    """Return the images of one run; how many closing embeddings each has follows from the
    counts.
    """
    tokens = side**2
    count = span.length // tokens
    closing, odd = divmod(span.length - count * tokens, count) if count else (0, 1)
    if odd:
        raise InputError(
            f"{span.length} visual embeddings from position {span.start} on are no whole images of "
            f"{tokens}, as in videos whose frames are pooled, which cannot be pruned; give images, "
            "or call the model within atp_patch.disabled(model)."
        )
    starts = range(span.start, span.stop, tokens + closing)
    return [VisualGrid(start, 1, side, side) for start in starts]


def _grids(query: GridQuery) -> Grids:
    side = _side(query.config)
    return [[grid for span in spans for grid in _images(span, side)] for spans in query.spans]


def _check(config: Any) -> None:
    tower, projector = _part(config, "vision_tower_cfg"), _part(config, "mm_projector_cfg")
    kind = projector.get("mm_projector_type")
    if kind not in DOWNSAMPLING or not {"image_size", "patch_size"} <= set(tower):
        raise UnsupportedModelError(
            f"the config's mm_projector_cfg is of type {kind!r} and its vision_tower_cfg has "
            f"{sorted(tower)}; the known types are {', '.join(DOWNSAMPLING)}, and image_size and "
            f"patch_size are needed. {CONVERT}"
        )
    if getattr(config, "dynamic_s2", False):
        raise UnsupportedModelError(
            "dynamic_s2 makes images of any size, whose rows and columns the language model is "
            "never told; set config.dynamic_s2 = False before the model is loaded."
        )


CONVERT = (
    "Checkpoints of LLaVA and VILA-7B become transformers models with "
    "python -m atp_patch.convert llava (or vila) FOLDER OUT."
)
VILA = Family(
    name="vila",
    model_types=("llava_llama", "vila"),
    grids=_grids,
    token_ids=(),
    visual_tokens=lambda config: _side(config) ** 2,
    check=_check,
    outer=Outer(decoder="llm", embed="_embed", mend=f"give a VILA-1.5 or NVILA object. {CONVERT}"),
    layout="one square an image",
)
