"""LLaVA-PruMerge (Shang et al., 2024): keep what the tower attends to, merge the rest into it.

Before the decoder, from the attention of the tower's layer whose output the model uses. The
paper's §3.3 speaks of the last layer's keys, its algorithm 1 of the penultimate one's: for LLaVA,
which uses the penultimate layer, this is the latter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atp_patch.contract import Merge, TokenGroups, TowerMethod
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import (
    merge_weights,
    outliers,
    progressive_order,
    spread_supplement,
    top_k_mask,
)


@dataclass(frozen=True)
class PruMerge(TowerMethod):
    """Keep the outliers of attention, or as many as the budget says, and merge the rest into them.

    Attributes:
        neighbours: how many of the tokens that go are merged into each one that stays (k).
    """

    name: ClassVar[str] = "prumerge"
    summary: ClassVar[str] = "outliers of the tower's attention, the rest merged into them"

    neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise ConfigError(
                f"neighbours={self.neighbours} must be at least 0 (0: merge nothing)."
            )

    @property
    def needs_budget(self) -> bool:
        """The number of outliers is the image's own, unless a budget is given."""
        return False

    def merge(self, groups: TokenGroups) -> Merge:
        """Algorithm 1."""
        keep = self.choose(groups)
        index, weight, changed = merge_weights(
            groups.attention, groups.key, groups.valid, keep, self.neighbours
        )
        return Merge(keep, index, weight, changed)

    def choose(self, groups: TokenGroups) -> Tensor:
        """(G, n) bool, the tokens that stay."""
        if groups.counts is None:
            return outliers(groups.attention, groups.valid, groups.minimum)
        counts = torch.tensor(groups.counts, device=groups.valid.device)
        return top_k_mask(groups.attention, groups.valid, counts)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, and as many tokens again from an even grid (§3.4)."""

    name: ClassVar[str] = "prumerge+"
    summary: ClassVar[str] = "prumerge, and as many tokens again from an even grid"

    def choose(self, groups: TokenGroups) -> Tensor:
        """Half by attention, half spread over the grid among those that attention left."""
        if groups.counts is None:
            chosen = outliers(groups.attention, groups.valid, groups.minimum)
            further = chosen.sum(1)
        else:
            counts = torch.tensor(groups.counts, device=groups.valid.device)
            chosen = top_k_mask(groups.attention, groups.valid, counts - counts // 2)
            further = counts // 2
        return spread_supplement(chosen, _turns(groups), groups.valid, further)


def _turns(groups: TokenGroups) -> Tensor:
    """(G, n) the turn of each token in an order of its grid whose every beginning is even."""
    turns = torch.zeros_like(groups.row)
    for number, size in enumerate(zip(groups.heights, groups.widths, strict=True)):
        order = progressive_order(*size).to(turns.device)
        place = groups.row[number] * size[1] + groups.column[number]
        turns[number] = order[place.clamp(max=order.numel() - 1)]
    return turns
