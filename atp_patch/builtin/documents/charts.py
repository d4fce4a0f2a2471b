"""Charts: bars and lines over labelled points, with a labelled axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atp_patch.builtin.documents.asked import DocumentQuestion, inks
from atp_patch.builtin.documents.canvas import Box, Canvas
from atp_patch.builtin.documents.fonts import FONTS, SIZES_PX, font
from atp_patch.builtin.documents.words import SERIES
from atp_patch.builtin.scenes import pick
from atp_patch.builtin.vocabulary import OBJECT_COLOURS

TASKS: tuple[str, ...] = ("value", "highest", "trend", "points", "all_values")
_MARGIN_PX = 6
_LEAST_STEP_PX = 8
"""The least distance between two heights of the axis, so that they can be distinguished."""


@dataclass(frozen=True)
class Chart:
    """The contents of a chart.

    Attributes:
        labels: label of each point, from left to right.
        values: value of each point, a whole number on the axis.
        label_boxes: box of each label.
        marks: box of each point of a line, or of the upper end of each bar.
        ticks: for each value on the axis, the box of its label.
        line: whether the chart has a line; otherwise it has bars.
    """

    labels: list[str]
    values: list[int]
    label_boxes: list[Box]
    marks: list[Box]
    ticks: dict[int, Box]
    line: bool


def draw(
    rng: np.random.Generator, width_px: int, height_px: int, fonts: tuple[str, ...] = FONTS
) -> tuple[Canvas, Chart]:
    """Draw a chart of 3 to 10 points; each value is at a labelled height of the axis."""
    paper, ink = inks(rng)
    canvas = Canvas(width_px, height_px, paper)
    written = font(pick(rng, fonts), SIZES_PX[int(rng.integers(3))])
    origin_x = _MARGIN_PX + written.width_px("90") + 6
    origin_y = height_px - _MARGIN_PX - written.height_px - 4
    across = max(written.width_px(name) for name in SERIES) + 6
    number = int(rng.integers(3, min((width_px - _MARGIN_PX - origin_x) // across, 10) + 1))
    pitch = (width_px - _MARGIN_PX - origin_x) // number
    step_px = max(written.height_px, _LEAST_STEP_PX)
    heights = min((origin_y - _MARGIN_PX - written.height_px // 2) // step_px, 9)
    step_px = (origin_y - _MARGIN_PX - written.height_px // 2) // heights
    unit = int((1, 5, 10)[int(rng.integers(3))])
    levels = rng.integers(1, heights + 1, size=number)
    best = int(rng.integers(number))  # only one point is the highest
    levels[levels == levels.max()] = max(int(levels.max()) - 1, 1)
    levels[best] = min(int(levels.max()) + 1, heights)
    start = int(rng.integers(len(SERIES) - number + 1))
    labels = list(SERIES[start : start + number])
    canvas.fill(Box(origin_x, _MARGIN_PX, origin_x + 1, origin_y), ink)
    canvas.fill(Box(origin_x, origin_y, width_px - _MARGIN_PX, origin_y + 1), ink)
    ticks = {}
    for level in range(1, heights + 1):
        y, text = origin_y - level * step_px, str(level * unit)
        left = origin_x - 4 - written.width_px(text)
        ticks[level * unit] = canvas.text(written, text, left, y - written.height_px // 2, ink)
        canvas.fill(Box(origin_x - 3, y, origin_x, y + 1), ink)
    line = bool(rng.random() < 0.4)
    colour = OBJECT_COLOURS[pick(rng, tuple(OBJECT_COLOURS))]
    middles = [origin_x + pitch * at + pitch // 2 for at in range(number)]
    tops = [origin_y - int(level) * step_px for level in levels]
    marks, label_boxes = list[Box](), list[Box]()
    if line:
        canvas.lines(list(zip(middles, tops, strict=True)), colour, 2)
    for middle, top, label in zip(middles, tops, labels, strict=True):
        if line:
            marks.append(canvas.dot(middle, top, 3, colour))
        else:
            half = max(pitch // 3, 3)
            canvas.fill(Box(middle - half, top, middle + half, origin_y), colour)
            marks.append(Box(middle - half, top - 2, middle + half, top + 4))
        left = middle - written.width_px(label) // 2
        label_boxes.append(canvas.text(written, label, left, origin_y + 3, ink))
    values = [int(level) * unit for level in levels]
    return canvas, Chart(labels, values, label_boxes, marks, ticks, line)


def ask(chart: Chart, rng: np.random.Generator, task: str) -> DocumentQuestion | None:
    """Make a question of a task, or return None if the chart allows none."""
    at = int(rng.integers(len(chart.labels)))
    if task == "value":
        label, value = chart.labels[at], chart.values[at]
        text = pick(rng, (f"What is the value of {label}?", f"Which value does {label} have?"))
        evidence = (chart.label_boxes[at], chart.marks[at], chart.ticks[value])
        return DocumentQuestion(task, text, str(value), evidence)
    if task == "highest":
        best = max(range(len(chart.values)), key=chart.values.__getitem__)
        if chart.values.count(chart.values[best]) > 1:
            return None
        text = pick(rng, ("Which label has the highest value?", "Where is the value highest?"))
        return DocumentQuestion(
            task, text, chart.labels[best], (*chart.marks, chart.label_boxes[best])
        )
    if task == "trend":
        if not chart.line or chart.values[0] == chart.values[-1]:
            return None
        answer = "higher" if chart.values[-1] > chart.values[0] else "lower"
        text = "Is the line higher or lower at its end than at its beginning?"
        return DocumentQuestion(task, text, answer, (chart.marks[0], chart.marks[-1]))
    if task == "points":
        noun = "points" if chart.line else "bars"
        text = pick(rng, (f"How many {noun} are there?", f"Count the {noun}."))
        return DocumentQuestion(task, text, str(len(chart.labels)), tuple(chart.marks))
    if task == "all_values":
        answer = ", ".join(
            f"{label} {value}" for label, value in zip(chart.labels, chart.values, strict=True)
        )
        ticks = (chart.ticks[value] for value in dict.fromkeys(chart.values))
        shown = (*chart.label_boxes, *chart.marks, *ticks)
        return DocumentQuestion(task, "List all labels with their values.", answer, shown)
    raise ValueError(f"there is no task {task!r} about charts; there are {', '.join(TASKS)}.")
