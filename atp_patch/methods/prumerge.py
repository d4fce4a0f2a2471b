"""LLaVA-PruMerge (Shang et al., 2024, arXiv 2403.15388): keep what the tower attends to, and merge
the rest into it.

The method prunes before the decoder, by the class token's attention (eq. 2): outliers of it stay
(§3.2), and each takes in the dropped tokens with the most similar keys, weighed by their attention
(§3.3, algorithm 1). The readings taken here: attention and keys are those of the tower's layer
whose output the model uses, where §3.3 names the last layer and algorithm 1 the penultimate one,
which LLaVA uses; weights are normalised, which the printed sum is not; only tokens that go are
merged; and in a tower without a class token the attention is what a token gets from all tokens on
average.
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
    """Keep the outliers of attention, or as many as the budget says, and merge others into them.

    Attributes:
        neighbours: how many dropped tokens are merged into each kept token (k).
    """

    name: ClassVar[str] = "prumerge"
    summary: ClassVar[str] = "outliers of the tower's attention, the rest merged into them"

    neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise ConfigError(f"neighbours={self.neighbours} must be at least 0; 0 merges nothing.")

    @property
    def needs_budget(self) -> bool:
        """False: without a budget the number of outliers in the image decides."""
        return False

    def merge(self, groups: TokenGroups) -> Merge:
        """Choose and merge tokens by the paper's algorithm 1."""
        keep = self.choose(groups)
        index, weight, changed = merge_weights(
            groups.attention, groups.key, groups.valid, keep, self.neighbours
        )
        return Merge(keep, index, weight, changed)

    def choose(self, groups: TokenGroups) -> Tensor:
        """Return (G, n) bool, True for the tokens that are kept."""
        if groups.counts is None:
            return outliers(groups.attention, groups.valid, groups.minimum)
        counts = torch.tensor(groups.counts, device=groups.valid.device)
        return top_k_mask(groups.attention, groups.valid, counts)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge that keeps as many tokens again from an even grid (§3.4)."""

    name: ClassVar[str] = "prumerge+"
    summary: ClassVar[str] = "prumerge, and as many tokens again from an even grid"

    def choose(self, groups: TokenGroups) -> Tensor:
        """Choose half by attention, and half from the others, spread evenly over the grid."""
        if groups.counts is None:
            chosen = outliers(groups.attention, groups.valid, groups.minimum)
            further = chosen.sum(1)
        else:
            counts = torch.tensor(groups.counts, device=groups.valid.device)
            chosen = top_k_mask(groups.attention, groups.valid, counts - counts // 2)
            further = counts // 2
        return spread_supplement(chosen, _turns(groups), groups.valid, further)


def _turns(groups: TokenGroups) -> Tensor:
    """Return (G, n) int64: each token's number in an order of its grid whose first parts are
    even.
    """
    turns = torch.zeros_like(groups.row)
    for number, size in enumerate(zip(groups.heights, groups.widths, strict=True)):
        order = progressive_order(*size).to(turns.device)
        place = groups.row[number] * size[1] + groups.column[number]
        turns[number] = order[place.clamp(max=order.numel() - 1)]
    return turns
