"""Dense labels of windows of pictures: what stands in each patch.

A patch is a square of 8 pixels and a visual token one of 16. Each patch is labelled in two halves,
because small characters are narrower than a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atp_patch.builtin.documents.canvas import Box, Writing
from atp_patch.builtin.documents.fonts import FIRST, LAST
from atp_patch.builtin.scenes import PATCH_PX, Layout
from atp_patch.builtin.vocabulary import OBJECT_COLOURS, SHAPES
from workshop.smol.pieces import UNKNOWN, Pieces

FIELDS: dict[str, int] = {
    "left": 2 + LAST - FIRST,
    "right": 2 + LAST - FIRST,
    "part": 5,
    "colour": 1 + len(OBJECT_COLOURS),
    "shape": 1 + len(SHAPES),
}
"""Number of classes of each label of a patch. Class 0 is "nothing".

``left`` and ``right`` are the characters in the halves, ``part`` is which quarter of the line's
height the patch is in, ``colour`` is of an object, a bar or a road, ``shape`` is of an object.
"""
_CODE = np.array([65536, 256, 1], dtype=np.float32)
"""Makes one number of a colour, which float32 holds exactly."""
_SLACK = 0.2
"""Share of a line's height that may be outside of the window; there is no ink at the edge."""


@dataclass
class Labels:
    """Labels of a window.

    Attributes:
        patches: (rows, columns, FIELDS) int64.
        pieces: (rows, columns) int64, numbers of `Pieces` candidates.
    """

    patches: NDArray[np.int64]
    pieces: NDArray[np.int64]


def blank(width_px: int, height_px: int) -> Labels:
    """Make the labels of a window in which nothing stands."""
    shape = (height_px // PATCH_PX, width_px // PATCH_PX)
    patches = np.zeros((*shape, len(FIELDS)), dtype=np.int64)
    return Labels(patches, np.zeros(shape, dtype=np.int64))


def add_writings(
    labels: Labels, writings: Sequence[Writing], pieces: Pieces, left: int, top: int
) -> None:
    """Add the labels of texts.

    Characters and pieces that the window's border cuts get the label UNKNOWN.

    Args:
        labels: the labels of the window, which are changed.
        writings: texts of the picture.
        pieces: gives the tokens of texts.
        left, top: the window's place in the picture.
    """
    rows, columns = labels.pieces.shape
    width, height = columns * PATCH_PX, rows * PATCH_PX
    middles_y = np.arange(rows) * PATCH_PX + PATCH_PX // 2
    middles_x = np.arange(columns) * PATCH_PX + PATCH_PX // 2
    halves_x = np.arange(2 * columns) * (PATCH_PX // 2) + PATCH_PX // 4
    halves = np.zeros((rows, 2 * columns), dtype=np.int64)
    for writing in writings:
        upper, lower, edges = writing.top - top, writing.bottom - top, writing.edges - left
        if lower <= 0 or upper >= height or edges[-1] <= 0 or edges[0] >= width:
            continue
        slack = _SLACK * (lower - upper)
        cut = upper < -slack or lower > height + slack
        first, last = np.searchsorted(middles_y, (upper, lower))
        codes = np.array([ord(character) - FIRST for character in writing.text])
        codes = np.where(codes > 0, codes + 1, 0)
        begin, end = np.searchsorted(halves_x, (edges[0], edges[-1]))
        at = np.searchsorted(edges, halves_x[begin:end], side="right") - 1
        outside = cut | (edges[at] < -1) | (edges[at + 1] > width + 1)
        halves[first:last, begin:end] = np.where(outside, UNKNOWN, codes[at])
        begin, end = np.searchsorted(middles_x, (edges[0], edges[-1]))
        at = np.searchsorted(edges, middles_x[begin:end], side="right") - 1
        token = pieces.of(writing.text)
        # The first and the last character of each character's piece.
        changes = np.flatnonzero(np.diff(token)) + 1
        starts, stops = np.array([0, *changes]), np.array([*changes, len(token)])
        group = np.searchsorted(changes, at, side="right")
        outside = cut | (edges[starts[group]] < -1) | (edges[stops[group]] > width + 1)
        labels.pieces[first:last, begin:end] = np.where(outside, UNKNOWN, token[at])
        quarter = 1 + (4 * (middles_y[first:last] - upper)) // (lower - upper)
        labels.patches[first:last, begin:end, 2] = UNKNOWN if cut else quarter[:, None]
    labels.patches[..., :2] = halves.reshape(rows, columns, 2)


def add_colours(labels: Labels, pixels: NDArray[np.float32], pieces: Pieces) -> None:
    """Add the colours of bars, lines and roads. Texts on them are added afterwards.

    Args:
        labels: the labels of the window, which are changed.
        pixels: (height, width, 3), the window without noise, where marks have exact colours.
        pieces: gives the tokens of names.
    """
    rows, columns = labels.pieces.shape
    coded = pixels @ _CODE
    for number, (name, colour) in enumerate(OBJECT_COLOURS.items()):
        here = coded == np.array(colour, dtype=np.float32) @ _CODE
        share = here.reshape(rows, PATCH_PX, columns, PATCH_PX).mean((1, 3))
        labels.patches[share >= 0.1, 3] = 1 + number
        labels.pieces[share >= 0.1] = pieces.of(name)[0]


def add_icons(
    labels: Labels, icons: Sequence[tuple[str, Box]], pieces: Pieces, left: int, top: int
) -> None:
    """Add the names of icons. An icon of which less than half is in the window is UNKNOWN.

    Args:
        labels: the labels of the window, which are changed.
        icons: names and boxes of the picture's icons.
        pieces: gives the tokens of names.
        left, top: the window's place in the picture.
    """
    rows, columns = labels.pieces.shape
    middles_y = np.arange(rows) * PATCH_PX + PATCH_PX // 2 + top
    middles_x = np.arange(columns) * PATCH_PX + PATCH_PX // 2 + left
    for name, box in icons:
        first, last = np.searchsorted(middles_y, (box.top, box.bottom))
        begin, end = np.searchsorted(middles_x, (box.left, box.right))
        whole = (box.right - box.left) * (box.bottom - box.top)
        cut = (last - first) * (end - begin) * PATCH_PX**2 < whole / 2
        labels.pieces[first:last, begin:end] = UNKNOWN if cut else pieces.of(name)[0]


def add_objects(
    labels: Labels, layout: Layout, owners: NDArray[np.int64], pieces: Pieces, left: int, top: int
) -> None:
    """Add the labels of the objects of a scene.

    The upper patches of an object's visual tokens get the piece of its colour, and the lower ones
    that of its shape.

    Args:
        labels: the labels of the window, which are changed.
        layout: the contents of the scene.
        owners: (rows, columns) of the window's patches, the number of the object that most of the
            patch shows, or a larger number.
        pieces: gives the tokens of names.
        left, top: the window's place in the picture.
    """
    rows, columns = labels.pieces.shape
    for number, item in enumerate(layout.objects):
        mine = owners == number
        if not mine.any():
            continue
        x, y, room = item.x_px - left, item.y_px - top, item.radius_px // 2
        cut = not (room <= x <= columns * PATCH_PX - room and room <= y <= rows * PATCH_PX - room)
        labels.patches[mine, 3] = 1 + list(OBJECT_COLOURS).index(item.colour)
        labels.patches[mine, 4] = UNKNOWN if cut else 1 + SHAPES.index(item.shape)
        names = (pieces.of(item.colour)[0], UNKNOWN if cut else pieces.of(item.shape)[0])
        for row, name in enumerate(names):
            labels.pieces[row::2][mine[row::2]] = name
