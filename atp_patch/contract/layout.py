"""Where the visual tokens of a forward pass are: grids, runs of placeholders, the layout.

Shapes: ``B`` batch, ``L`` sequence, ``V`` visual tokens (packed, padded to the longest sample),
``T`` text rows, ``H`` heads, ``Hk`` key/value heads, ``K`` keys, ``d`` head size, ``D`` hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualGrid:
    """One image, tile or video in the sequence, of ``frames`` x ``height`` x ``width`` tokens.

    The token of (frame, row, column) is at position
    ``start + frame * frame_stride + row * row_stride + column``. Tokens in the gaps (a newline
    after each row, a class token of each frame) belong to no grid and are never pruned.

    Attributes:
        start: position of the first token in the sequence.
        frames, height, width: number of frames, of rows in a frame and of columns in a row.
        row_stride: distance between the first tokens of two rows; 0 if rows follow without a gap.
        frame_stride: distance between the first tokens of two frames; 0 if frames follow without a
            gap.
    """

    start: int
    frames: int
    height: int
    width: int
    row_stride: int = 0
    frame_stride: int = 0

    @property
    def length(self) -> int:
        """Number of visual tokens in the grid."""
        return self.frames * self.height * self.width

    def coordinates(self) -> Tensor:
        """Return (4, length) int64: each token's position in the sequence, frame, row and column.

        Tokens are in the order of the sequence.
        """
        row_stride = self.row_stride or self.width
        frame_stride = self.frame_stride or row_stride * self.height
        frame, row, column = torch.meshgrid(
            torch.arange(self.frames),
            torch.arange(self.height),
            torch.arange(self.width),
            indexing="ij",
        )
        position = self.start + frame * frame_stride + row * row_stride + column
        return torch.stack([position, frame, row, column]).reshape(4, -1)


@dataclass(frozen=True)
class Layout:
    """Where the prunable visual tokens of one forward pass are.

    Attributes:
        length: sequence length ``L`` of the forward pass.
        grids: for each sample, its grids in sequence order.
        position: (B, V) int64, position of each visual token in the sequence; 0 in padding slots.
        image: (B, V) int64, the number of the token's grid within the sample; 0 in padding slots.
        frame, row, column: (B, V) int64, the token's place in its grid; 0 in padding slots.
        valid: (B, V) bool, False in padding slots.
    """

    length: int
    grids: tuple[tuple[VisualGrid, ...], ...]
    position: Tensor
    image: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    valid: Tensor

    @classmethod
    def from_grids(
        cls, grids: Sequence[Sequence[VisualGrid]], length: int, device: torch.device
    ) -> Layout:
        """Make the layout of each sample's grids, on ``device``.

        A sample without images has an empty list of grids.
        """
        totals = [sum(grid.length for grid in sample) for sample in grids]
        table = torch.zeros(5, len(totals), max(totals, default=0), dtype=torch.long)
        for b, sample in enumerate(grids):
            at = 0
            for number, grid in enumerate(sample):
                stop = at + grid.length
                position, frame, row, column = grid.coordinates()
                image = torch.full_like(position, number)
                table[:, b, at:stop] = torch.stack([position, image, frame, row, column])
                at = stop
        slots = torch.arange(table.shape[-1])
        valid = slots < torch.tensor(totals, dtype=torch.long).unsqueeze(-1)
        position, image, frame, row, column = table.to(device).unbind()
        frozen = tuple(tuple(sample) for sample in grids)
        return cls(length, frozen, position, image, frame, row, column, valid.to(device))

    def to(self, device: torch.device) -> Layout:
        """Return the same layout on another device."""
        tensors = (self.position, self.image, self.frame, self.row, self.column, self.valid)
        return Layout(self.length, self.grids, *(t.to(device) for t in tensors))

    @property
    def totals(self) -> tuple[int, ...]:
        """Number of prunable visual tokens of each sample before any pruning."""
        return tuple(sum(grid.length for grid in sample) for sample in self.grids)

    @cached_property
    def mask(self) -> Tensor:
        """(B, L) bool, True at the prunable visual tokens of the sequence."""
        mask = torch.zeros(
            len(self.grids), self.length + 1, dtype=torch.bool, device=self.position.device
        )
        # Padding slots write to an additional last column, which is then cut off.
        column = torch.where(self.valid, self.position, self.length)
        return mask.scatter_(1, column, True)[:, : self.length]


@dataclass(frozen=True)
class Span:
    """A run of equal placeholder ids in one sample: positions ``start`` to ``stop - 1``."""

    start: int
    stop: int
    token_id: int

    @property
    def length(self) -> int:
        """Number of placeholders in the run."""
        return self.stop - self.start
