"""PyramidDrop (Xing et al., arXiv 2410.17247): halve the visual tokens at each of a few stages.

The decoder is cut into four stages of equal length (§3.2), and at the end of each of the first
three the share lambda = 0.5 of the tokens stays: those with the most attention of the last token of
the instruction. The readings taken here: the attention is that of the last layer of the stage,
averaged over heads, and all visual tokens of a prompt are ranked together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from atp_patch.contract import Decision, View
from atp_patch.methods.base import Ranking, attention_paid


@dataclass(frozen=True)
class PyramidDrop(Ranking):
    """Keep half of the tokens before each of three layers, by the attention of the last token.

    Where the caller names no layers, they are 8, 16 and 24 of 32 in proportion to the decoder's
    depth; without a budget each of them keeps half. A target is divided among the layers as for
    all methods.
    """

    name: ClassVar[str] = "pyramiddrop"
    summary: ClassVar[str] = "attention of the last prompt token, half of the tokens at each stage"
    depths: ClassVar[tuple[float, ...] | None] = (0.25, 0.5, 0.75)
    default_keep: ClassVar[float | None] = 0.5

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Rank the visual tokens by one row of the attention of the layer before."""
        row = view.last[:, None]
        scores = attention_paid(view, row, torch.ones_like(row, dtype=torch.bool))
        return Decision(self.best(view, scores), scores={"last": scores})
