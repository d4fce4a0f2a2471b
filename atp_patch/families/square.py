"""Families whose images, or tiles of images, are squares of one size that the config fixes.

A tile is a grid of its own: the processors that cut images into tiles do not tell the model how the
tiles lie next to each other. Markers between tiles and rows of tiles are text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from atp_patch.families.base import Family, Grids, square_grids
from atp_patch.families.towers import shuffled_tower
from atp_patch.types import GridQuery


def _number(size: Any) -> int:
    """A side that a config gives as one number or as (height, width)."""
    return int(size if isinstance(size, int) else size[0])


def _patches(config: Any) -> int:
    """Patches along a side of the vision tower's picture."""
    vision = config.vision_config
    return _number(vision.image_size) // _number(vision.patch_size)


def _squares(side: Callable[[Any], int]) -> Callable[[GridQuery], Grids]:
    return lambda query: [square_grids(spans, side(query.config)) for spans in query.spans]


def _internvl_side(config: Any) -> int:
    return round(_patches(config) * config.downsample_ratio)


def _idefics3_side(config: Any) -> int:
    return _patches(config) // int(config.scale_factor)


def _gemma3_side(config: Any) -> int:
    return math.isqrt(config.mm_tokens_per_image)


INTERNVL = Family(
    name="internvl",
    model_types=("internvl",),
    grids=_squares(_internvl_side),
    tower=shuffled_tower,
    resizable=True,
)
IDEFICS3 = Family(
    name="idefics3",
    model_types=("idefics3", "smolvlm"),
    grids=_squares(_idefics3_side),
)
PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    grids=_squares(_patches),
    causal=False,
    visual_tokens=lambda config: _patches(config) ** 2,
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    grids=_squares(_gemma3_side),
    causal=False,
    visual_tokens=lambda config: int(config.mm_tokens_per_image),
)
