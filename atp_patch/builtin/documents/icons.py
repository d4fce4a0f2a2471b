"""Sheets of icons: small pictures of known things in rows.

``icons.npz`` holds the icons at two sizes, so that a sheet needs no font file.
``ICONS_LICENSE.txt`` says where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atp_patch.builtin.documents.asked import DocumentQuestion, pick_some
from atp_patch.builtin.documents.canvas import Box, Canvas
from atp_patch.builtin.documents.words import ICONS, ORDINALS
from atp_patch.builtin.scenes import pick

TASKS: tuple[str, ...] = ("count", "there", "right_of", "name_row", "name_all")
SIZES_PX: tuple[int, ...] = (28, 40)
"""Width and height of an icon."""
MOST_IN_ROW = 7
_MARGIN_PX = 6
_MOST_NAMED = 40
"""Largest number of icons of a sheet that are named one after another."""
_FILE = Path(__file__).with_name("icons.npz")


@dataclass(frozen=True)
class Sheet:
    """The contents of a sheet.

    Attributes:
        rows: the names of the icons of each row, from left to right; no row is empty.
        boxes: the box of each of these icons.
    """

    rows: list[list[str]]
    boxes: list[list[Box]]

    @property
    def names(self) -> list[str]:
        """The names of all icons, row by row."""
        return [name for row in self.rows for name in row]

    def of(self, name: str) -> list[Box]:
        """Return the boxes of the icons of a name."""
        return [
            box
            for row, boxes in zip(self.rows, self.boxes, strict=True)
            for other, box in zip(row, boxes, strict=True)
            if other == name
        ]


@cache
def icons(size_px: int) -> dict[str, NDArray[np.uint8]]:
    """Load the (size_px, size_px, 4) RGBA pictures of all icons at one of their sizes."""
    with np.load(_FILE, allow_pickle=False) as file:
        return dict(zip(file["names"].tolist(), file[str(size_px)], strict=True))


def draw(
    rng: np.random.Generator, width_px: int, height_px: int, fonts: tuple[str, ...] = ()
) -> tuple[Canvas, Sheet]:
    """Draw a sheet of one to about eighty icons of 3 to 12 kinds.

    Args:
        rng: the random generator.
        width_px, height_px: size of the sheet.
        fonts: not used, since nothing is written; other documents have them.
    """
    paper = rng.integers(215, 256, size=3)
    canvas = Canvas(width_px, height_px, (int(paper[0]), int(paper[1]), int(paper[2])))
    size = SIZES_PX[int(rng.integers(len(SIZES_PX)))]
    pictures = icons(size)
    gap = int(rng.integers(4, 25))
    kinds = pick_some(rng, ICONS, int(rng.integers(3, 13)))
    share = float(rng.uniform(0.3, 1.0))
    across = min((width_px - 2 * _MARGIN_PX) // (size + gap), MOST_IN_ROW)
    rows, boxes = list[list[str]](), list[list[Box]]()
    for row in range((height_px - 2 * _MARGIN_PX) // (size + gap)):
        names, places = list[str](), list[Box]()
        for column in range(across):
            if rng.random() > share:
                continue
            # The icons of a row are shifted up or down by less than what parts the rows.
            left = _MARGIN_PX + column * (size + gap) + int(rng.integers(gap // 2 + 1))
            top = _MARGIN_PX + row * (size + gap) + int(rng.integers(gap // 2 + 1))
            name = pick(rng, kinds)
            places.append(canvas.icon(name, pictures[name], left, top))
            names.append(name)
        if names:
            rows.append(names)
            boxes.append(places)
    if not rows:
        name = kinds[0]
        rows, boxes = [[name]], [[canvas.icon(name, pictures[name], _MARGIN_PX, _MARGIN_PX)]]
    return canvas, Sheet(rows, boxes)


def ask(sheet: Sheet, rng: np.random.Generator, task: str) -> DocumentQuestion | None:
    """Make a question of a task, or return None if the sheet allows none."""
    names = sheet.names
    if task == "count":
        name = pick(rng, names)
        text = pick(rng, (f"How many icons show {_a(name)}?", f"Count the icons of {_a(name)}."))
        return DocumentQuestion(task, text, str(names.count(name)), tuple(sheet.of(name)))
    if task == "there":
        there = rng.random() < 0.5
        name = pick(rng, names if there else [name for name in ICONS if name not in names])
        evidence = sheet.of(name)[:1] if there else [box for row in sheet.boxes for box in row]
        text = pick(rng, (f"Does an icon show {_a(name)}?", f"Is {_a(name)} there?"))
        return DocumentQuestion(task, text, "yes" if there else "no", tuple(evidence))
    if task == "right_of":
        pairs = [
            (row, place)
            for row, inside in enumerate(sheet.rows)
            for place, name in enumerate(inside[:-1])
            if names.count(name) == 1
        ]
        if not pairs:
            return None
        row, place = pairs[int(rng.integers(len(pairs)))]
        name, answer = sheet.rows[row][place : place + 2]
        text = pick(rng, (f"What is right of the {name}?", f"Which icon follows the {name}?"))
        return DocumentQuestion(task, text, answer, tuple(sheet.boxes[row][place : place + 2]))
    if task == "name_row":
        row = int(rng.integers(min(len(sheet.rows), len(ORDINALS))))
        first_of_rows = tuple(boxes[0] for boxes in sheet.boxes[:row])
        text = f"Name the icons of the {ORDINALS[row]} row."
        evidence = [*first_of_rows, *sheet.boxes[row]]
        return DocumentQuestion(task, text, " ".join(sheet.rows[row]), tuple(evidence))
    if task == "name_all":
        if len(names) > _MOST_NAMED:
            return None
        evidence = [box for boxes in sheet.boxes for box in boxes]
        answer = ", ".join(" ".join(row) for row in sheet.rows)
        return DocumentQuestion(task, "Name all icons row by row.", answer, tuple(evidence))
    raise ValueError(f"there is no task {task!r} about icons; there are {', '.join(TASKS)}.")


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
