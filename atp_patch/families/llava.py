"""LLaVA and VipLLaVA: one square grid an image, from a CLIP-like tower."""

from __future__ import annotations

from typing import Any

from atp_patch.errors import UnsupportedModelError
from atp_patch.families.base import Family, Grids, equal_images
from atp_patch.types import GridQuery, VisualGrid


def _side(config: Any) -> int:
    vision = config.vision_config
    return int(vision.image_size) // int(vision.patch_size)


def _visual_tokens(config: Any) -> int:
    return _side(config) ** 2


def _class_tokens(config: Any) -> int:
    """The strategy "full" keeps the tower's class token in front of the patches."""
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    has_class = config.vision_config.model_type.startswith("clip")
    return int(strategy == "full" and has_class)


def _grids(query: GridQuery) -> Grids:
    config: Any = query.config
    side, extra = _side(config), _class_tokens(config)
    mend = "let the model's own processor expand <image> to placeholders."
    return [
        [
            VisualGrid(image.start + extra, 1, side, side)
            for image in equal_images(spans, side * side + extra, mend)
        ]
        for spans in query.spans
    ]


def _check(config: Any) -> None:
    vision_type = config.vision_config.model_type
    if vision_type == "pixtral":
        raise UnsupportedModelError(
            "a LLaVA model with a Pixtral tower has a grid of its own for every image; supported "
            "are towers with one square grid (CLIP, SigLIP)."
        )


LLAVA = Family(
    name="llava",
    model_types=("llava", "vipllava"),
    grids=_grids,
    visual_tokens=_visual_tokens,
    check=_check,
)
