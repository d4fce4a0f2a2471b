"""ATP-LLaVA's attention scores (arXiv 2412.00447, eq. 3-4), and a fixed share by them (table 2).

The paper does not say how both scores, a logit and a probability, come to one scale. The readings
taken here are options: which of them count, ranks in their place, and what probabilities are
normalised over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from atp_patch.contract import Decision, LayerMethod, View
from atp_patch.maths import gather_heads, redundant_scores, self_scores
from atp_patch.methods.base import Ranking, attention_paid, choice


@dataclass(frozen=True)
class Scored(LayerMethod):
    """The two attention scores and their options.

    Attributes:
        score: which scores make the redundant score: the "mean" of both (as in the paper), "cross"
            or "self".
        score_norm: how scores are mapped to (0, 1): "rank", "minmax", or "none" (the equations as
            printed).
        cross_over: whether the probabilities of text rows are taken over all keys ("all"), or are
            renormalised over the visual tokens in each head and row ("visual").
        causal_self: whether a token's self score counts only the queries that may see the token.
    """

    score: str = "cross"
    score_norm: str = "rank"
    cross_over: str = "visual"
    causal_self: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("score", self.score, ("mean", "cross", "self"))
        choice("score_norm", self.score_norm, ("rank", "minmax", "none"))
        choice("cross_over", self.cross_over, ("all", "visual"))

    def scores(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Return S_self, S_cross and S_redundant, each (B, V) float32 (eq. 3, eq. 4 and below)."""
        s_self = self_scores(
            gather_heads(view.query, view.slot),
            gather_heads(view.key, view.slot + view.key_offset),
            view.slot_valid,
            view.scaling,
            causal=self.causal_self,
        )
        s_cross = attention_paid(
            view, view.text, view.text_valid, renormalise=self.cross_over == "visual"
        )
        redundant = redundant_scores(
            s_self, s_cross, view.slot_valid, score=self.score, norm=self.score_norm
        )
        return s_self, s_cross, redundant


@dataclass(frozen=True)
class Fixed(Ranking, Scored):
    """Keep a fixed share at each layer by the ATP score (the fixed pruning ratio of Table 2)."""

    name: ClassVar[str] = "fixed"
    summary: ClassVar[str] = "ATP's attention scores, fixed share"

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Keep the tokens with the highest redundant scores."""
        s_self, s_cross, redundant = self.scores(view)
        keep = self.best(view, redundant)
        scores = {"self": s_self, "cross": s_cross, "redundant": redundant}
        return Decision(keep, scores=scores)
