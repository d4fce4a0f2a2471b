"""FastV (Chen et al., 2024, arXiv 2403.06764): rank by the last prompt token's attention.

After layer K the visual tokens are ranked by attention, averaged over heads, and a share R of them
is dropped (§4.1). The paper words the criterion as the attention that a token gets on average. The
reading taken here is that of the authors' program: the attention that the last token of the prompt
pays, in the layer before the pruning layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from atp_patch.contract import Decision, View
from atp_patch.maths import cross_scores, gather_heads
from atp_patch.methods.base import Ranking, choice


@dataclass(frozen=True)
class FastV(Ranking):
    """Keep a fixed share of tokens by the attention of the last token, averaged over heads.

    The paper's setting is ``layers=[2], keep=0.5``.

    Attributes:
        rope: whether queries and keys are taken "after" rotary embedding, which gives the layer's
            own attention (as in the paper), or "before" it. Rotary embedding favours tokens close
            to the last token, that is, the bottom of the image.
    """

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "attention of the last prompt token, fixed share"

    rope: str = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("rope", self.rope, ("after", "before"))

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Rank the visual tokens by one row of the attention of the layer before."""
        row = view.last[:, None]
        query, key, column = view.query, view.key, view.slot + view.key_offset
        mask = view.mask_rows(row)
        if self.rope == "before":
            query, key = view.unrotated()
            column = view.slot  # keys of earlier turns exist only after rotary embedding
            mask = mask[..., view.key_offset :]
        scores = cross_scores(
            gather_heads(query, row),
            key,
            torch.ones_like(row, dtype=torch.bool),
            column,
            view.slot_valid,
            view.scaling,
            mask=mask,
            softcap=view.softcap,
            sinks=view.sinks,
        )
        keep = self.best(view, scores)
        return Decision(keep, scores={"last": scores})
