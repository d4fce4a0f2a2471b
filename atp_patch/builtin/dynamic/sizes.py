"""How large a scene is shown.

On a larger canvas the objects and the sign lie further apart and are as large as before: a sign
has the same letters in a wide picture as in a small one. All answers stay true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from atp_patch.builtin.render import draw
from atp_patch.builtin.scenes import IMAGE_PX, PATCH_PX, Layout, Plate, Scene, Sign, scene_rng

TOKEN_PX = 16
SIDES_PX: tuple[int, ...] = (192, 208, 224, 240)
"""Widths and heights of the pictures, 144 to 225 visual tokens."""

_Item = TypeVar("_Item", Sign, Plate)
_STREAM = 2000  # of a scene's chance; those of the generator and of other pictures are others


def scene_size(split: str, index: int, sides_px: Sequence[int] = SIDES_PX) -> tuple[int, int]:
    """(width, height) in pixels at which a scene is shown: always the same for a split and index.

    Width and height are drawn independently.
    """
    rng: np.random.Generator = scene_rng(split, index, _STREAM)
    width, height = (sides_px[int(k)] for k in rng.integers(len(sides_px), size=2))
    return width, height


def laid_out(layout: Layout, size: tuple[int, int]) -> Layout:
    """The layout on a canvas of (width, height), no smaller than 192 x 192: centres move apart in
    proportion. A sign or plate that stands on the grid of patches stands on it again.
    """
    x_scale, y_scale = (side / IMAGE_PX for side in size)
    objects = tuple(
        replace(item, x_px=round(item.x_px * x_scale), y_px=round(item.y_px * y_scale))
        for item in layout.objects
    )
    sign = None if layout.sign is None else _moved(layout.sign, x_scale, y_scale)
    plate = None if layout.plate is None else _moved(layout.plate, x_scale, y_scale)
    return replace(layout, objects=objects, sign=sign, plate=plate)


def _moved(item: _Item, x_scale: float, y_scale: float) -> _Item:
    step = 1 if item.x_px % PATCH_PX or item.y_px % PATCH_PX else PATCH_PX
    x, y = (
        round(((at + length / 2) * scale - length / 2) / step) * step
        for at, length, scale in (
            (item.x_px, item.width_px, x_scale),
            (item.y_px, item.height_px, y_scale),
        )
    )
    return replace(item, x_px=x, y_px=y)


def at_size(scene: Scene, size: tuple[int, int], noise: float) -> Scene:
    """The scene on a canvas of (width, height): another picture, the same questions.

    Args:
        noise: standard deviation of the pixel noise, 0-255.
    """
    layout = laid_out(scene.layout, size)
    image = draw(layout, scene_rng(scene.split, scene.index, 1), noise, size)
    return replace(scene, layout=layout, image=image)
