"""Rotary embedding of visual tokens by row and column, gathered from the host's tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_patch.contract import Layout
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.maths import rotary_frequencies, turn_by_place


class RowColumnRotary:
    """The rotary tables of one forward pass in which visual tokens have a row and a column.

    Rows and columns are counted from the first token of the image, frame or tile. The token in row
    r and column c is rotated by the positions of the r-th and the c-th token behind the first one.
    These stand in the same sequence, so that the host's own tables hold their angles, however the
    host computes them.
    """

    def __init__(self, layout: Layout) -> None:
        first = torch.zeros(layout.valid.shape, dtype=torch.long)
        for b, grids in enumerate(layout.grids):
            at = 0
            for grid in grids:
                position, _, row, column = grid.coordinates()
                stride = grid.row_stride or grid.width
                first[b, at : at + grid.length] = position - row * stride - column
                at += grid.length
        first = first.to(layout.position.device)
        self.row, self.column = (
            self._places(layout, first + offset) for offset in (layout.row, layout.column)
        )
        self._made: dict[int, tuple[Any, Any]] = {}

    @staticmethod
    def _places(layout: Layout, visual: Tensor) -> Tensor:
        """Return (B, L) int64: the place of each token, and for visual tokens the given one (B,
        V).
        """
        batch, length = layout.valid.shape[0], layout.length
        own = torch.arange(length + 1, device=visual.device).repeat(batch, 1)
        column = torch.where(layout.valid, layout.position, length)
        return own.scatter(1, column, visual)[:, :length]

    def tables(self, host: Any) -> Any:
        """Return the tables (cos, sin) that a layer gets in place of the host's; they are made
        once.

        Raises:
            UnsupportedModelError: where the layout of the host's tables is not known.
        """
        if id(host) not in self._made:
            self._made[id(host)] = (host, self._turn(host))
        return self._made[id(host)][1]

    def _turn(self, tables: Any) -> Any:
        known = isinstance(tables, tuple) and len(tables) == 2 and tables[0].ndim == 3
        frequency = rotary_frequencies(tables[0][:, -1:]) if known else None
        if frequency is None:
            raise UnsupportedModelError(
                "this decoder's rotary tables are not of a known kind, so rope_2d cannot turn "
                "visual tokens by row and column; patch without it."
            )
        frequency = frequency.to(tables[0].device)
        row, column = self.row.to(tables[0].device), self.column.to(tables[0].device)
        return tuple(turn_by_place(table, row, column, frequency) for table in tables)
