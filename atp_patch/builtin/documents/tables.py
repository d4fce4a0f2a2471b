"""Tables of numbers with named rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atp_patch.builtin.documents.asked import DocumentQuestion, inks, pick_some
from atp_patch.builtin.documents.canvas import Box, Canvas
from atp_patch.builtin.documents.fonts import FONTS, SIZES_PX, font
from atp_patch.builtin.documents.words import COLUMNS, NAMES
from atp_patch.builtin.scenes import pick

TASKS: tuple[str, ...] = ("cell", "largest", "rows", "read_row", "read_table")
_MOST_READ = 24
"""Largest number of cells of a table that is read as a whole."""
_MARGIN_PX = 6


@dataclass(frozen=True)
class Table:
    """The contents of a table.

    Attributes:
        rows, columns: names of the rows and of the columns.
        row_boxes, column_boxes: box of each of these names.
        values: the number in each cell, row by row.
        boxes: box of each number, row by row.
    """

    rows: list[str]
    columns: list[str]
    row_boxes: list[Box]
    column_boxes: list[Box]
    values: list[list[int]]
    boxes: list[list[Box]]


def draw(
    rng: np.random.Generator, width_px: int, height_px: int, fonts: tuple[str, ...] = FONTS
) -> tuple[Canvas, Table]:
    """Draw a table of 2 to 12 rows and 1 to 6 columns, as far as they fit.

    No number appears twice in a column.
    """
    paper, ink = inks(rng)
    canvas = Canvas(width_px, height_px, paper)
    written = font(pick(rng, fonts), SIZES_PX[int(rng.integers(4))])
    first_px = max(written.width_px(name) for name in NAMES) + 8
    cell_px = max(written.width_px(name) for name in COLUMNS) + 8
    step = written.height_px + int(rng.integers(2, 9))
    fits_across = (width_px - 2 * _MARGIN_PX - first_px) // cell_px
    fits_down = (height_px - 2 * _MARGIN_PX) // step - 1
    columns = pick_some(rng, COLUMNS, int(rng.integers(1, min(fits_across, 6) + 1)))
    rows = pick_some(rng, NAMES, int(rng.integers(2, min(fits_down, 12) + 1)))
    left = int(rng.integers(_MARGIN_PX, width_px - first_px - cell_px * len(columns)))
    top = int(rng.integers(_MARGIN_PX, height_px - step * (len(rows) + 1)))
    numbers = np.stack([rng.permutation(90)[: len(rows)] + 10 for _ in columns], axis=1)
    at = [left + first_px + cell_px * number for number in range(len(columns))]
    column_boxes = [
        canvas.text(written, name, x, top, ink) for name, x in zip(columns, at, strict=True)
    ]
    row_boxes, boxes = list[Box](), list[list[Box]]()
    for number, name in enumerate(rows):
        y = top + step * (number + 1)
        row_boxes.append(canvas.text(written, name, left, y, ink))
        values = zip(numbers[number].tolist(), at, strict=True)
        boxes.append([canvas.text(written, str(value), x, y, ink) for value, x in values])
    if rng.random() < 0.5:  # rulings
        right = at[-1] + cell_px
        for number in range(len(rows) + 1):
            y = top + step * (number + 1) - 2
            canvas.fill(Box(left, y, right - 4, y + 1), ink)
    return canvas, Table(rows, columns, row_boxes, column_boxes, numbers.tolist(), boxes)


def ask(table: Table, rng: np.random.Generator, task: str) -> DocumentQuestion | None:
    """Make a question of a task."""
    row, column = int(rng.integers(len(table.rows))), int(rng.integers(len(table.columns)))
    name, kind = table.rows[row], table.columns[column]
    if task == "cell":
        text = pick(rng, (f"What is the {kind} of {name}?", f"Which {kind} does {name} have?"))
        found = (table.row_boxes[row], table.column_boxes[column], table.boxes[row][column])
        return DocumentQuestion(task, text, str(table.values[row][column]), found)
    if task == "largest":
        best = max(range(len(table.rows)), key=lambda number: table.values[number][column])
        text = pick(rng, (f"Who has the largest {kind}?", f"Whose {kind} is the largest?"))
        cells = (cells[column] for cells in table.boxes)
        evidence = (table.column_boxes[column], *cells, table.row_boxes[best])
        return DocumentQuestion(task, text, table.rows[best], evidence)
    if task == "rows":
        text = pick(rng, ("How many names are in the table?", "Count the names in the table."))
        return DocumentQuestion(task, text, str(len(table.rows)), tuple(table.row_boxes))
    if task == "read_row":
        answer = " ".join(str(value) for value in table.values[row])
        evidence = (table.row_boxes[row], *table.boxes[row])
        return DocumentQuestion(task, f"Read the numbers of {name}.", answer, evidence)
    if task == "read_table":
        if len(table.rows) * len(table.columns) > _MOST_READ:
            return None
        named = zip(table.rows, table.values, strict=True)
        answer = ", ".join(" ".join((one, *map(str, values))) for one, values in named)
        evidence = (*table.row_boxes, *(box for boxes in table.boxes for box in boxes))
        return DocumentQuestion(task, "Read the table row by row.", answer, evidence)
    raise ValueError(f"there is no task {task!r} about tables; there are {', '.join(TASKS)}.")
