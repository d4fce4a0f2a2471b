"""Marks: newline and class tokens, which are visual tokens by their ids and stand in no grid.

They are never pruned unless ``patch_model(..., prune_marks=True)`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from atp_patch.contract import Span, VisualGrid
from atp_patch.families.base import Grids


def with_marks(grids: Sequence[Sequence[VisualGrid]], spans: Sequence[Sequence[Span]]) -> Grids:
    """Return the grids of each sample, and behind them its marks as grids of one column.

    Marks that follow each other at equal distances, like the newlines of one picture, make one
    column.

    Args:
        grids: the grids of each sample, without marks.
        spans: the runs of placeholders of each sample.
    """
    return [
        [*sample, *_columns(_left_over(sample, runs))]
        for sample, runs in zip(grids, spans, strict=True)
    ]


def _left_over(grids: Sequence[VisualGrid], spans: Sequence[Span]) -> list[int]:
    placed = {int(at) for grid in grids for at in grid.coordinates()[0]}
    return [at for span in spans for at in range(span.start, span.stop) if at not in placed]


def _columns(marks: Sequence[int]) -> list[VisualGrid]:
    found: list[VisualGrid] = []
    at = 0
    while at < len(marks):
        height, stride = 1, 0
        if at + 1 < len(marks):
            stride = marks[at + 1] - marks[at]
            while at + height < len(marks) and marks[at + height] == marks[at] + height * stride:
                height += 1
        found.append(VisualGrid(marks[at], 1, height, 1, row_stride=stride))
        at += height
    return found
