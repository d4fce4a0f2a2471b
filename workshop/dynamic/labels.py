"""Dense training labels of the second model: what each visual token shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from atp_patch.builtin.dynamic.sizes import TOKEN_PX
from atp_patch.builtin.render import outline
from atp_patch.builtin.scenes import PATCH_PX, Layout
from atp_patch.builtin.vocabulary import MAX_OBJECTS
from workshop.labels import NOTHING, middles

_OWNED_SHARE = 0.25


def token_owners(
    layout: Layout, size: tuple[int, int], token_px: int = TOKEN_PX
) -> NDArray[np.int64]:
    """(rows, columns): what each visual token shows.

    It is the number of an object, MAX_OBJECTS + the place of a character, or NOTHING: what covers
    most of the token, if it covers at least a quarter.

    Args:
        layout: the layout on the canvas.
        size: (width, height) of the canvas in pixels.
        token_px: side of the square that one visual token shows.
    """
    masks = np.zeros((NOTHING, size[1], size[0]), dtype=np.float32)
    for number, item in enumerate(layout.objects):
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).polygon(outline(item), fill=1)
        masks[number] = np.asarray(mask)
    if layout.sign is not None:
        top, left = layout.sign.y_px + PATCH_PX, layout.sign.x_px + PATCH_PX
        for k in range(len(layout.sign.text)):
            start = left + 2 * PATCH_PX * k
            masks[MAX_OBJECTS + k, top : top + 3 * PATCH_PX, start : start + 2 * PATCH_PX] = 1
    rows, columns = size[1] // token_px, size[0] // token_px
    covered = masks.reshape(NOTHING, rows, token_px, columns, token_px).mean((2, 4))
    return np.where(covered.max(0) >= _OWNED_SHARE, covered.argmax(0), NOTHING)


def token_middles(
    layout: Layout, size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(rows, columns) each: the `labels.middles` of the visual tokens."""
    return middles(layout, size, TOKEN_PX, spread=0.5, reach=2.0)
