"""FastV (Chen et al., 2024): rank by the attention that the last prompt token pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from atp_patch.maths import cross_scores, gather_heads
from atp_patch.methods.base import Method, keep_best, mask_rows
from atp_patch.types import Decision, View


@dataclass(frozen=True)
class FastV(Method):
    """Keep a fixed share by the last token's attention, averaged over heads.

    The paper's setting is ``layers=[2], keep=0.5``.
    """

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "attention of the last prompt token, fixed share"

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Rank the visual tokens by one row of the attention of the layer before."""
        row = view.last[:, None]
        scores = cross_scores(
            gather_heads(view.query, row),
            view.key,
            torch.ones_like(row, dtype=torch.bool),
            view.slot + view.key_offset,
            view.slot_valid,
            view.scaling,
            mask=mask_rows(view.mask, row),
        )
        keep = keep_best(view, scores)
        return Decision(keep, exact=True, scores={"last": scores})
