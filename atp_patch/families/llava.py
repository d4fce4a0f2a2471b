"""LLaVA, VipLLaVA and Video-LLaVA: each image or frame is one square, from a tower like CLIP's.

LLaVA with a Pixtral tower has images of any size, each with a grid of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atp_patch.contract import GridQuery, Span, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids, equal_images
from atp_patch.families.pixtral import pixtral_grids
from atp_patch.families.towers import pixtral_tower, square_tower

MEND = "let the model's own processor expand <image> to placeholders."


def _side(config: Any) -> int:
    vision = config.vision_config
    return int(vision.image_size) // int(vision.patch_size)


def _is_pixtral(config: Any) -> bool:
    return bool(config.vision_config.model_type == "pixtral")


def _visual_tokens(config: Any) -> int | None:
    return None if _is_pixtral(config) else _side(config) ** 2


def _class_tokens(config: Any) -> int:
    """Return how many class tokens stand in front of an image's patches.

    The strategy "full" keeps the class token of a tower that has one.
    """
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    has_class = config.vision_config.model_type.startswith("clip")
    return int(strategy == "full" and has_class)


def _images(spans: Sequence[Span], config: Any) -> list[VisualGrid]:
    side, extra = _side(config), _class_tokens(config)
    images = equal_images(spans, side * side + extra, MEND)
    return [VisualGrid(image.start + extra, 1, side, side) for image in images]


def _grids(query: GridQuery) -> Grids:
    config: Any = query.config
    if _is_pixtral(config):
        return pixtral_grids(query)
    return [_images(spans, config) for spans in query.spans]


def _video(span: Span, side: int) -> VisualGrid:
    """Return the video of one run of placeholders, in which a class token stands before each
    frame.
    """
    stride = side * side + 1
    if span.length % stride:
        raise InputError(
            f"{span.length} visual tokens from position {span.start} on are no whole frames of "
            f"{stride}; let the model's own processor expand <video> to placeholders."
        )
    return VisualGrid(span.start + 1, span.length // stride, side, side, frame_stride=stride)


def _video_grids(query: GridQuery) -> Grids:
    config: Any = query.config
    return [
        [
            grid
            for span in spans
            for grid in (
                [_video(span, _side(config))]
                if span.token_id == config.video_token_id
                else _images([span], config)
            )
        ]
        for spans in query.spans
    ]


LLAVA = Family(
    name="llava",
    model_types=("llava", "vipllava"),
    grids=_grids,
    visual_tokens=_visual_tokens,
    tower=lambda config: (pixtral_tower if _is_pixtral(config) else square_tower)(config),
    resizable=True,
    layout="one square an image; with a Pixtral tower its rows",
)
VIDEO_LLAVA = Family(
    name="video_llava",
    model_types=("video_llava",),
    grids=_video_grids,
    token_ids=("image_token_id", "video_token_id"),
    tower=lambda config: square_tower(config, "image_tower", "video_tower"),
    resizable=True,
    layout="one square an image or frame; a class token before each frame",
)
