"""The tokens that are left between two pruning layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atp_patch.maths import local_index, scatter_tokens


@dataclass
class Survivors:
    """The tokens that enter the layers from one pruning layer up to the next.

    Attributes:
        index: (B, n) int64 positions in the sequence of this pass, in order. Padding slots are
            last, or first where a layer keeps a state. They repeat the sample's first token.
        valid: (B, n) bool, or None where every slot holds a token.
        padding_last: where padding slots stand, if there are any.
        narrowed: what was made once for these tokens, with the object that it was made of.
    """

    index: Tensor
    valid: Tensor | None
    padding_last: bool = True
    narrowed: dict[Any, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Survivors:
        """Return the same survivors on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return Survivors(self.index.to(device), valid, self.padding_last)

    @property
    def causality_hides_padding(self) -> bool:
        """Whether causal attention never comes to a padding slot."""
        return self.valid is None or self.padding_last

    @property
    def all_valid(self) -> Tensor:
        """(B, n) bool: ``valid``, with True everywhere where it is None."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def columns(self, length: int) -> Tensor:
        """Return (B, length) int64: the slot of each position of the sequence, -1 where it has
        none.
        """
        return self.once("slots", None, lambda: local_index(self.index, self.all_valid, length))

    def mask(self, length: int) -> Tensor:
        """Return (B, length) bool: the positions that survive."""
        column = torch.where(self.all_valid, self.index, length)
        mask = torch.zeros(column.shape[0], length + 1, dtype=torch.bool, device=column.device)
        return mask.scatter_(1, column, True)[:, :length]

    def once(self, key: Any, source: Any, make: Callable[[], Any]) -> Any:
        """Return the result of ``make()``, which runs once for each key.

        The source object is kept alive, so that a key that holds its id stays unique.
        """
        if key not in self.narrowed:
            self.narrowed[key] = (source, make())
        return self.narrowed[key][1]

    def restore_hidden(self, hidden: Tensor, length: int) -> Tensor:
        """Return (B, length, *) states with zeros at pruned places, made from (B, n, *) of the
        survivors.
        """
        here = self.to(hidden.device)
        return scatter_tokens(hidden, here.index, here.all_valid, length)

    def restore_attention(self, weights: Tensor, length: int, *, square: bool) -> Tensor:
        """Return (B, H, length, K) attention weights with zeros at pruned places, made from (B, H,
        n, K).

        Args:
            weights: (B, H, n, K).
            length: ``L``, tokens of the whole sequence.
            square: the keys are the survivors too, and are put into their places as well.
        """
        rows = self.restore_hidden(weights.transpose(1, 2), length).transpose(1, 2)
        if not square:
            return rows
        return self.restore_hidden(rows.permute(0, 3, 1, 2), length).permute(0, 2, 3, 1)
