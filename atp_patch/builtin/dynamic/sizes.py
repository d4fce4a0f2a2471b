"""The size at which a scene is shown.

On a larger canvas the objects and the sign are further apart but not larger, so that a sign has the
same letters in a wide picture as in a small one. All answers stay correct.
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
_STREAM = 2000  # stream of random numbers; scenes and documents use other streams


def scene_size(split: str, index: int, sides_px: Sequence[int] = SIDES_PX) -> tuple[int, int]:
    """Return the (width, height) in pixels at which a scene is shown.

    Width and height are drawn independently and depend only on the split and the index.
    """
    rng: np.random.Generator = scene_rng(split, index, _STREAM)
    width, height = (sides_px[int(k)] for k in rng.integers(len(sides_px), size=2))
    return width, height


def laid_out(layout: Layout, size: tuple[int, int]) -> Layout:
    """Return the layout on a canvas of (width, height), which is at least 192 x 192.

    Centres move apart in proportion. A sign or plate that is aligned with the patches stays
    aligned.
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
    """Return the scene with a picture on a canvas of (width, height) and the same questions.

    Args:
        scene: the scene.
        size: (width, height) in pixels.
        noise: standard deviation of the pixel noise, 0-255.
    """
    layout = laid_out(scene.layout, size)
    image = draw(layout, scene_rng(scene.split, scene.index, 1), noise, size)
    return replace(scene, layout=layout, image=image)
