"""Dense training labels: what each patch shows, and what each noun of a question refers to."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw

from atp_patch.builtin.questions import RELATION_MARGIN_PX
from atp_patch.builtin.render import outline
from atp_patch.builtin.scenes import GRID, IMAGE_PX, PATCH_PX, Layout, SceneObject
from atp_patch.builtin.vocabulary import (
    BACKGROUND_COLOURS,
    CHARACTERS,
    MAX_OBJECTS,
    MAX_SIGN,
    OBJECT_COLOURS,
    OPENERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
)

IGNORE = -100

PATCH_FIELDS: dict[str, int] = {
    "colour": len(OBJECT_COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "size": len(SIZES) + 1,
    "core": 2,
    "offset_y": 8,
    "offset_x": 8,
    "character": len(CHARACTERS) + 1,
    "place": MAX_SIGN + 1,
    "part": 7,
    "background": len(BACKGROUND_COLOURS),
    "texture": len(TEXTURES),
    "row": GRID,
    "column": GRID,
}
"""Number of classes of each label of a patch; the last class of most labels is "none"."""

NOUN_FIELDS: dict[str, int] = {
    "count": MAX_OBJECTS + 1,
    "colour": len(OBJECT_COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "row": 8,
    "column": 8,
    **{f"character{k}": len(CHARACTERS) + 1 for k in range(MAX_SIGN)},
}
"""Number of classes of each label of a noun. Rows and columns are 24 pixels wide."""

SIDE_FIELDS: dict[str, int] = {"below": 2, "right": 2, "asked": len(RELATIONS)}
"""Number of classes of each label of a question's second noun: where its object is relative to the
object of the first noun, and which relation the question is about."""

HOLDS_FIELDS: dict[str, int] = {"holds": 2}
"""Number of classes of the label that says at the second noun whether the relation holds."""

_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
_ANY_SHAPE = ("object", "objects", "shapes")
_OWNED_SHARE = 0.2
"""A patch belongs to an object if the object covers at least this share of it."""


def patch_labels(layout: Layout) -> NDArray[np.int64]:
    """(576, number of PATCH_FIELDS): what each patch shows, in raster order."""
    labels = {name: np.full((GRID, GRID), n - 1) for name, n in PATCH_FIELDS.items()}
    labels["core"][:] = 0
    labels["background"][:] = list(BACKGROUND_COLOURS).index(layout.background)
    labels["texture"][:] = TEXTURES.index(layout.texture)
    labels["row"][:] = np.arange(GRID)[:, None]
    labels["column"][:] = np.arange(GRID)
    middle = (np.arange(GRID) + 0.5) * PATCH_PX
    for item in layout.objects:
        owned = _coverage(item) >= _OWNED_SHARE
        labels["colour"][owned] = list(OBJECT_COLOURS).index(item.colour)
        labels["shape"][owned] = SHAPES.index(item.shape)
        labels["size"][owned] = SIZES.index(item.size)
        dy = np.clip(np.round((item.y_px - middle) / PATCH_PX), -3, 3).astype(int) + 3
        dx = np.clip(np.round((item.x_px - middle) / PATCH_PX), -3, 3).astype(int) + 3
        labels["offset_y"][owned] = np.broadcast_to(dy[:, None], (GRID, GRID))[owned]
        labels["offset_x"][owned] = np.broadcast_to(dx[None, :], (GRID, GRID))[owned]
        labels["core"][_core(item)] = 1
    if layout.sign is not None:
        row, column = layout.sign.y_px // PATCH_PX + 1, layout.sign.x_px // PATCH_PX + 1
        for k, character in enumerate(layout.sign.text):
            cell = np.s_[row : row + 3, column + 2 * k : column + 2 * k + 2]
            labels["character"][cell] = CHARACTERS.index(character)
            labels["place"][cell] = k
            labels["part"][cell] = np.arange(6).reshape(3, 2)
    return np.stack([labels[name].ravel() for name in PATCH_FIELDS], axis=-1)


def patch_places(layout: Layout) -> NDArray[np.float32]:
    """(576, 5): the places of each patch and of the centre of its object, and a weight.

    The values are the patch's row and column, the centre's row and column (or the patch's, without
    an object), each -1..1 over the image, and the weight, 1 on objects and 0.1 elsewhere.
    """
    middle = (np.arange(GRID) + 0.5) * PATCH_PX
    places = np.zeros((GRID, GRID, 5), dtype=np.float32)
    places[..., 0] = places[..., 2] = middle[:, None]
    places[..., 1] = places[..., 3] = middle
    places[..., 4] = 0.1
    for item in layout.objects:
        places[_coverage(item) >= _OWNED_SHARE, 2:] = (item.y_px, item.x_px, 1.0)
    places[..., :4] = places[..., :4] * (2 / IMAGE_PX) - 1
    return places.reshape(-1, 5)


NOTHING = 15
"""Owner of a patch that shows neither an object nor a character."""


def patch_owners(layout: Layout) -> NDArray[np.int64]:
    """(576,): what each patch shows.

    It is the number of an object, MAX_OBJECTS + the place of a character, or NOTHING.
    """
    owners = np.full((GRID, GRID), NOTHING)
    for number, item in enumerate(layout.objects):
        owners[_coverage(item) >= _OWNED_SHARE] = number
    if layout.sign is not None:
        row, column = layout.sign.y_px // PATCH_PX + 1, layout.sign.x_px // PATCH_PX + 1
        for k in range(len(layout.sign.text)):
            owners[row : row + 3, column + 2 * k : column + 2 * k + 2] = MAX_OBJECTS + k
    return owners.ravel()


def patch_cores(layout: Layout) -> NDArray[np.int64]:
    """(576,): the number of the object whose middle 2 x 2 patches include the patch, or NOTHING."""
    cores = np.full((GRID, GRID), NOTHING)
    for number, item in enumerate(layout.objects):
        cores[_core(item)] = number
    return cores.ravel()


def patch_middles(layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(576,) each: the `middles` of the patches."""
    near, shares = middles(layout, (IMAGE_PX, IMAGE_PX), PATCH_PX, spread=0.8, reach=6.0)
    return near.ravel(), shares.ravel()


def middles(
    layout: Layout, size: tuple[int, int], cell_px: int, spread: float, reach: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(rows, columns) each: the nearest object of each cell, and the cell's share of its middle.

    The shares of an object form a bell around its centre that sums to 4. Unlike the 2 x 2 patches
    of `patch_cores` it changes smoothly with the centre.

    Args:
        layout: the scene.
        size: (width, height) of the canvas in pixels.
        cell_px: side of a cell in pixels.
        spread: standard deviation of the bell in cells.
        reach: squared distance from the centre, in cells, at which the bell ends.
    """
    columns, rows = (side // cell_px for side in size)
    near = np.full((rows, columns), NOTHING)
    shares = np.zeros((rows, columns), dtype=np.float32)
    y, x = (np.arange(rows) + 0.5)[:, None], np.arange(columns) + 0.5
    for number, item in enumerate(layout.objects):
        far = (y - item.y_px / cell_px) ** 2 + (x - item.x_px / cell_px) ** 2
        bell = np.exp(-far / (2 * spread**2)) * (far < reach)
        bell *= 4 / bell.sum()
        mine = bell > shares
        near[mine], shares[mine] = number, bell[mine]
    return near, shares


def _core(item: SceneObject) -> tuple[slice, slice]:
    """Return an object's middle 2 x 2 patches; any stride-2 subset of the grid has one of them."""
    top, left = round(item.y_px / PATCH_PX) - 1, round(item.x_px / PATCH_PX) - 1
    return np.s_[top : top + 2, left : left + 2]


def _coverage(item: SceneObject) -> NDArray[np.float64]:
    """(24, 24): the share of each patch that an object covers."""
    mask = PILImage.new("L", (IMAGE_PX, IMAGE_PX))
    ImageDraw.Draw(mask).polygon(outline(item), fill=1)
    cells = np.asarray(mask).reshape(GRID, PATCH_PX, GRID, PATCH_PX)
    coverage: NDArray[np.float64] = cells.mean(axis=(1, 3))
    return coverage


def noun_labels(text: str, layout: Layout) -> list[tuple[int, NDArray[np.int64], int]]:
    """Return the token index, labels and owners of each noun that names objects or the sign.

    The labels, (number of NOUN_FIELDS,), say how many objects the noun phrase matches and, if it
    matches one, describe it. Labels that do not apply are IGNORE. The owners are bits that say
    which patches (see `patch_owners`) show what the noun names.
    """
    tokens = [w.lower() if w in OPENERS else w for w in re.findall(r"\w+|[^\w\s]", text)]
    found = []
    for k, word in enumerate(tokens):
        values = dict.fromkeys(NOUN_FIELDS, IGNORE)
        owners = 0
        if word == "sign" and layout.sign is not None:
            padded = layout.sign.text.ljust(MAX_SIGN)
            for place, character in enumerate(padded):
                owners |= (character != " ") << (MAX_OBJECTS + place)
                values[f"character{place}"] = (*CHARACTERS, " ").index(character)
        elif word in SHAPES or word in _SINGULAR or word in _ANY_SHAPE:
            shape = None if word in _ANY_SHAPE else _SINGULAR.get(word, word)
            colour = tokens[k - 1] if tokens[k - 1] in OBJECT_COLOURS else None
            matches = [
                o for o in layout.objects if shape in (None, o.shape) and colour in (None, o.colour)
            ]
            values["count"] = len(matches)
            owners = sum(1 << k for k, o in enumerate(layout.objects) if o in matches)
            if len(matches) == 1:
                values.update(_describe(matches[0]))
        elif word == "common":
            ranked = Counter(o.colour for o in layout.objects).most_common(1)
            values["colour"] = list(OBJECT_COLOURS).index(ranked[0][0])
            owners = (1 << len(layout.objects)) - 1
        else:
            continue
        found.append((k, np.array([values[name] for name in NOUN_FIELDS]), owners))
    return found


def side_labels(text: str, layout: Layout) -> tuple[int, int, NDArray[np.int64]] | None:
    """Return the labels of a question about the relation of two objects, else None.

    Returns:
        The token indices of the first and the second noun, and the labels of SIDE_FIELDS and
        HOLDS_FIELDS. Labels along an axis on which the objects are almost level are IGNORE.
    """
    named = [(k, owners) for k, values, owners in noun_labels(text, layout) if values[0] == 1]
    asked = next((r for r in RELATIONS if f" {r} the " in text), None)
    if len(named) != 2 or asked is None:
        return None
    (at_first, first), (at_second, second) = named
    one, other = (layout.objects[owners.bit_length() - 1] for owners in (first, second))
    gaps = (other.y_px - one.y_px, other.x_px - one.x_px)
    sides = [int(gap > 0) if abs(gap) >= RELATION_MARGIN_PX else IGNORE for gap in gaps]
    side = sides[0] if asked in ("above", "below") else sides[1]
    holds = side == int(asked in ("above", "left of"))
    return at_first, at_second, np.array([*sides, RELATIONS.index(asked), int(holds)])


def _describe(item: SceneObject) -> dict[str, int]:
    return {
        "colour": list(OBJECT_COLOURS).index(item.colour),
        "shape": SHAPES.index(item.shape),
        "size": SIZES.index(item.size),
        "row": item.y_px * 8 // IMAGE_PX,
        "column": item.x_px * 8 // IMAGE_PX,
    }
