"""Idefics 2 and Aria: a picture or crop is a fixed number of learned queries, which lie in no grid.

Each query has seen the whole picture. A run of placeholders is one grid of a single row, so that
methods that look at places see the order of the queries and nothing more.
"""

from __future__ import annotations

from atp_patch.contract import GridQuery, VisualGrid
from atp_patch.families.base import Family, Grids


def _grids(query: GridQuery) -> Grids:
    return [[VisualGrid(span.start, 1, 1, span.length) for span in spans] for spans in query.spans]


IDEFICS2 = Family(
    name="idefics2",
    model_types=("idefics2", "aria"),
    grids=_grids,
    layout="one row of learned queries an image or crop, without places",
)
