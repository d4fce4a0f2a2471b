"""Molmo 2: a view of the whole and the picture itself, or the frames of a video; Fuyu: the picture.

Each row ends in an id of its own, the column id, so that rows which lie one id apart are one grid.
Where the processor leaves the column ids out, as the released ones do in the view of the whole and
in video frames, a grid is one run. It is then a square, because such pictures are shrunk to squares
first.
"""

from __future__ import annotations

import math

from atp_patch.contract import GridQuery, Span, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids
from atp_patch.families.pixtral import chains, stacked


def _grid(rows: list[Span]) -> VisualGrid:
    if len(rows) > 1:
        return stacked(rows)
    (run,) = rows
    side = math.isqrt(run.length)
    if side**2 != run.length:
        raise InputError(
            f"{run.length} visual tokens from position {run.start} on have no column ids between "
            "them and are no square; let the model's own processor make input_ids and pixel values "
            "together."
        )
    return VisualGrid(run.start, 1, side, side)


def _grids(query: GridQuery) -> Grids:
    return [[_grid(rows) for rows in chains(spans)] for spans in query.spans]


FUYU = Family(
    name="fuyu",
    model_types=("fuyu",),
    grids=lambda query: [[stacked(rows) for rows in chains(spans)] for spans in query.spans],
    layout="rows x columns, ids of text between rows",
)
MOLMO2 = Family(
    name="molmo2",
    model_types=("molmo2",),
    grids=_grids,
    causal=False,
    layout="the whole, then rows x columns; each frame one square",
)
