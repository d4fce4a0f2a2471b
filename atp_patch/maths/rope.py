"""Rotary embedding by row and column, the pruning positional embedding of ATP-LLaVA."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_frequencies(table: Tensor) -> Tensor | None:
    """Return the number of the frequency that each dimension of a rotary table rotates with.

    Args:
        table: (B, L, D) cosines or sines. The two dimensions that rotate together hold the same
            numbers, and lie side by side or half the table apart.

    Returns:
        (D,) int64 in [0, D / 2); None where the table is made in another way.
    """
    size = table.shape[-1]
    place = torch.arange(size)
    if size % 2:
        return None
    if torch.equal(table[..., : size // 2], table[..., size // 2 :]):
        return place % (size // 2)
    if torch.equal(table[..., ::2], table[..., 1::2]):
        return place // 2
    return None


def turn_by_place(table: Tensor, row: Tensor, column: Tensor, frequency: Tensor) -> Tensor:
    """Return a rotary table whose even frequencies rotate by one position and odd ones by another.

    In this way rows and columns both get frequencies from the whole range. A token whose two
    positions are its own keeps its embedding.

    Args:
        table: (B or 1, L, D) cosines or sines of the sequence's positions.
        row, column: (B, L) int64, the places in the sequence whose positions are used.
        frequency: (D,) int64 as :func:`rotary_frequencies` gives it.

    Returns:
        (B, L, D) cosines or sines.
    """
    wide = table.expand(row.shape[0], -1, -1)

    def at(place: Tensor) -> Tensor:
        return wide.gather(1, place[..., None].expand(-1, -1, wide.shape[2]))

    return torch.where(frequency % 2 == 0, at(row), at(column))
