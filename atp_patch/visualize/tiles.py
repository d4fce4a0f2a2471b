"""How a picture was cut into tiles, found by comparing the tiles with the picture.

Processors choose rows and columns by rules of their own, and do not always say which they chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 48  # pictures are compared at this size, in pixels
_ALIKE = 0.1  # the largest mean difference of what counts as the same picture; white is 1
_UNEVEN = 0.01  # added for tiles e times as wide as high, so that even pictures are cut in squares

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Divided:
    """A picture that was cut into tiles.

    Attributes:
        image: the tiles, put together.
        rows, columns: how many tiles there are.
        tiles: for each tile row by row, its number among the views.
        boxes: for each tile its left, upper, right and lower edge, as shares of the picture.
        whole: the number of the view that shows the whole picture, or None.
        difference: the mean difference from the picture, where white is 1.
    """

    image: Image.Image
    rows: int
    columns: int
    tiles: range
    boxes: tuple[Box, ...]
    whole: int | None
    difference: float


def likeness(image: Image.Image, view: Image.Image) -> float:
    """Return the mean difference of two pictures, from 0 to 1, stretched to the same square."""
    return float(np.abs(_small(image) - _small(view)).mean())


def divided(image: Image.Image, views: Sequence[Image.Image]) -> Divided | None:
    """Find how views of one size are tiles of a picture, one of them perhaps the whole of it.

    Returns:
        the rows and columns that look most like the picture, or None if none look like it.
    """
    sizes = {view.size for view in views}
    if len(sizes) != 1:
        return None
    ((width, height),) = sizes
    reference = _small(image)
    found: tuple[float, int, int, range, int | None] | None = None
    for whole in (len(views) - 1, 0, None):
        tiles = range(len(views))
        if whole is not None:
            if np.abs(_small(views[whole]) - reference).mean() > _ALIKE:
                continue
            tiles = tiles[1:] if whole == 0 else tiles[:-1]
        for rows in range(1, len(tiles) + 1):
            columns, rest = divmod(len(tiles), rows)
            if rest:
                continue
            small = _small(_together([views[n] for n in tiles], rows, columns, _SIDE, _SIDE))
            shape = log(image.width / columns * rows / image.height * height / width)
            difference = float(np.abs(small - reference).mean())
            cost = difference + _UNEVEN * abs(shape)
            if difference <= _ALIKE and (found is None or cost < found[0]):
                found = cost, rows, columns, tiles, whole
    if found is None:
        return None
    difference, rows, columns, tiles, whole = found
    boxes = tuple(
        (x / columns, y / rows, (x + 1) / columns, (y + 1) / rows)
        for y in range(rows)
        for x in range(columns)
    )
    canvas = _together([views[n] for n in tiles], rows, columns, width, height)
    return Divided(canvas, rows, columns, tiles, boxes, whole, difference)


def _together(
    tiles: Sequence[Image.Image], rows: int, columns: int, width: int, height: int
) -> Image.Image:
    """Put tiles beside each other, each at (width, height)."""
    canvas = Image.new("RGB", (columns * width, rows * height))
    for number, tile in enumerate(tiles):
        y, x = divmod(number, columns)
        canvas.paste(tile.convert("RGB").resize((width, height)), (x * width, y * height))
    return canvas


def _small(image: Image.Image) -> NDArray[np.float32]:
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)
