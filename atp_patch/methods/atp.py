"""ATP-LLaVA (Ye et al., 2024, arXiv 2412.00447): adaptive token pruning.

The scores of eq. 3-5 are computed from the queries and keys of the layer before, after rotary
embedding. A token is kept if its redundant score or its spatial score reaches the threshold for
this layer and sample (eq. 9-11 with hard decisions). Thresholds are predicted by small heads
(eq. 6-8) or set to a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from atp_patch.contract import Decision, ModuleSpec, View
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import (
    atp_loss,
    budget_thresholds,
    gather_tokens,
    hard_keep,
    layer_averages,
    soft_mask,
    spatial_scores,
    starting_thresholds,
    straight_through_mask,
    target_loss,
    top_k_mask,
)
from atp_patch.methods.atp_heads import ThresholdHeads, Thresholds
from atp_patch.methods.base import (
    best_of_each_image,
    choice,
    grid_table,
    minimum_counts,
)
from atp_patch.methods.fixed import Scored

_STEEPEST = 1e9  # the largest slope of a sigmoid; the paper's 1e6 already makes it a step
_WIDEST, _FINEST = 4096, 128  # the largest width of z, and the largest side of its input grid
_NEVER = -1e4  # a score so far below every threshold that its sigmoid is 0


@dataclass(frozen=True)
class ATP(Scored):
    """Adaptive token pruning with spatial augmented pruning.

    Attributes:
        thresholds: "budget" (without training: for every layer and sample the thresholds that keep
            exactly the budget) or "learned" (predicted by heads, whose weights an adapter holds).
        spatial_order: "progressive" (eq. 5 with every rate) or "strided" (a few sampling rates).
        lambda_sample: the scaling coefficient of eq. 5.
        spatial_share: the part of a budget that is filled by the spatial score. Learned thresholds
            start from it; with 0 or 1 one of the two scores is never used.
        surrogate: how learned thresholds get a gradient: "straight-through" (hard decisions
            forward, sigmoids of slope ``slope`` backward) or "literal" (eq. 9-11 with temperature
            ``slope``, 1e6 in the paper).
        slope: the slope of the sigmoids.
        slope_end, anneal_passes: the slope changes geometrically from ``slope`` to ``slope_end``
            over ``anneal_passes`` forward passes in training (micro-batches, if gradients are
            accumulated). The passes are counted in a buffer of the heads. By default the slope
            does not change.
        detach_scores: stop the gradient of the thresholds at the scores and at the question's
            hidden state, so that it does not reach the decoder.
        lambda_atp, lambda_target: weights of the two losses in eq. 14; the paper's ``lambda_atp``
            is 0.01 to 0.1. docs/results.md compares some values.
        target_loss: the form of eq. 13: "paper", "smooth" or "unbiased", as in
            ``maths.target_loss``.
        budget_gradient: the parameters that the losses of eq. 12 and 13 train: the whole heads
            ("all", as in the paper), or only the biases of the thresholds ("biases"), which are the
            same for every sample. Then differences between samples are learned only from the
            answers.
        threshold_inputs: the inputs of the heads: "scores" (as in the paper), or "scores+question",
            which adds the hidden state of the last prompt token. Answers are never an input.
        standardise: give the heads S_self and log S_cross with mean 0 and variance 1 over the
            sample's remaining tokens, instead of the scores themselves (as in the paper).
        heads_hidden_size: the width of z.
        reference_grid: the side of the grid to which the heads' inputs are resampled.
    """

    name: ClassVar[str] = "atp"
    summary: ClassVar[str] = "ATP-LLaVA: attention and spatial scores against thresholds"

    thresholds: str = "budget"
    spatial_order: str = "progressive"
    lambda_sample: float = 3.0
    spatial_share: float = 0.25
    surrogate: str = "straight-through"
    slope: float = 30.0
    slope_end: float | None = None
    anneal_passes: int = 0
    detach_scores: bool = True
    lambda_atp: float = 0.0
    lambda_target: float = 0.2
    target_loss: str = "unbiased"
    budget_gradient: str = "all"
    threshold_inputs: str = "scores+question"
    standardise: bool = True
    heads_hidden_size: int = 64
    reference_grid: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("thresholds", self.thresholds, ("budget", "learned"))
        choice("spatial_order", self.spatial_order, ("progressive", "strided"))
        choice("surrogate", self.surrogate, ("straight-through", "literal"))
        choice("threshold_inputs", self.threshold_inputs, ("scores", "scores+question"))
        choice("target_loss", self.target_loss, ("paper", "smooth", "unbiased"))
        choice("budget_gradient", self.budget_gradient, ("all", "biases"))
        if self.thresholds == "budget" and self.score_norm != "rank":
            raise ConfigError(
                f"score_norm={self.score_norm!r} cannot be set to a budget, only ranks can; use "
                "score_norm='rank', or thresholds='learned'."
            )
        if not 0 <= self.spatial_share <= 1:
            raise ConfigError(f"spatial_share={self.spatial_share} is not between 0 and 1.")
        if (self.slope_end is None) != (self.anneal_passes == 0) or self.anneal_passes < 0:
            raise ConfigError(
                f"slope_end={self.slope_end} and anneal_passes={self.anneal_passes} belong "
                "together; give the last slope and the number of passes, or neither."
            )
        if (
            min(self.slope, self.slope_end or 1.0) <= 0
            or min(self.lambda_atp, self.lambda_target) < 0
        ):
            raise ConfigError("slopes must be positive, lambda_atp and lambda_target not negative.")
        if self.lambda_sample <= 0:
            raise ConfigError(f"lambda_sample={self.lambda_sample} is not positive.")
        if max(self.slope, self.slope_end or 0.0) > _STEEPEST:
            raise ConfigError(f"slopes must be at most {_STEEPEST:g}.")
        if not 1 <= self.heads_hidden_size <= _WIDEST or not 1 <= self.reference_grid <= _FINEST:
            raise ConfigError(
                f"heads_hidden_size={self.heads_hidden_size} must be from 1 to {_WIDEST}, and "
                f"reference_grid={self.reference_grid} from 1 to {_FINEST}."
            )

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the scores that learned thresholds are compared with: both, or only one."""
        left_out = {0.0: "spatial", 1.0: "redundant"}.get(self.spatial_share)
        return tuple(name for name in ("redundant", "spatial") if name != left_out)

    @property
    def needs_budget(self) -> bool:
        """Whether thresholds are set to a budget; learned ones decide how many tokens are kept."""
        return self.thresholds == "budget"

    @property
    def takes_budget(self) -> bool:
        """Whether exactly the given number is kept; learned thresholds only aim at a budget."""
        return self.needs_budget

    def build(self, spec: ModuleSpec) -> nn.Module | None:
        """Make the threshold heads, or return None if thresholds are not learned."""
        if self.thresholds == "budget":
            return None
        return ThresholdHeads(
            spec,
            starting_thresholds(spec.shares, self.spatial_share, self.lambda_sample),
            hidden_size=self.heads_hidden_size,
            grid=self.reference_grid,
            question=self.threshold_inputs == "scores+question",
            standardise=self.standardise,
            anneals=self.slope_end is not None,
        )

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Decide by eq. 3-11 with hard decisions."""
        s_self, s_cross, redundant = self.scores(view)
        question = gather_tokens(view.hidden, view.last[:, None].to(view.hidden.device))[:, 0]
        if self.detach_scores:
            s_self, s_cross, redundant = s_self.detach(), s_cross.detach(), redundant.detach()
            question = question.detach()
        score_of_grid = partial(
            spatial_scores, order=self.spatial_order, lambda_sample=self.lambda_sample
        )
        spatial = view.of_token(grid_table(view.layout, score_of_grid))
        first = best_of_each_image(view, redundant)
        scores = {"redundant": redundant, "spatial": spatial}
        compared = redundant, spatial
        if isinstance(module, Thresholds):
            theta_r, theta_s = module(view, s_self, s_cross, question)
            best = top_k_mask(scores[self.compared[0]], view.slot_valid, minimum_counts(view))
            first = best if first is None else first | best
            redundant_or_never, spatial_or_never = (
                score if name in self.compared else torch.full_like(score, _NEVER)
                for name, score in scores.items()
            )
            compared = redundant_or_never, spatial_or_never
        else:
            free, counts = view.slot_valid, view.counts_tensor()
            if first is not None:  # these are always kept; the rest of the budget is for the others
                free, counts = free & ~first, (counts - first.sum(1)).clamp(min=0)
            theta_r, theta_s = budget_thresholds(
                redundant, spatial, free, counts, self.spatial_share
            )
        keep = hard_keep(*compared, theta_r, theta_s, view.slot_valid)
        if first is not None:
            keep = keep | first
        soft = counted = None
        if view.learning:
            assert isinstance(module, Thresholds)
            relax = soft_mask if self.surrogate == "literal" else straight_through_mask
            slope = self._slope(view, module)
            soft = relax(*compared, theta_r, theta_s, view.slot_valid, slope)
            if self.budget_gradient == "biases":
                moved = module.through_biases(view.layer, theta_r, theta_s)
                counted = relax(*compared, *moved, view.slot_valid, slope)
            if first is not None:
                soft = soft.masked_fill(first, 1.0)
                counted = None if counted is None else counted.masked_fill(first, 1.0)
        return Decision(
            keep,
            scores={"self": s_self, "cross": s_cross, **scores},
            thresholds={"redundant": theta_r, "spatial": theta_s},
            soft=soft,
            counted=counted,
        )

    def margins(self, decision: Decision) -> Tensor:
        """Return the margins of :meth:`LayerMethod.margins` for the scores that are compared."""
        compared = {name: decision.thresholds[name] for name in self.compared}
        return super().margins(replace(decision, thresholds=compared))

    def _slope(self, view: View, module: Thresholds) -> float | Tensor:
        if self.slope_end is None:
            return self.slope
        slope = module.annealed(view, self.slope, self.slope_end, self.anneal_passes)
        return slope.to(view.slot.device)

    def losses(
        self,
        counts: Sequence[Tensor],
        totals: Tensor,
        layers: Sequence[int],
        num_layers: int,
        target: float,
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the losses L_atp and L_target of eq. 12-13 with their weights from eq. 14."""
        averages = layer_averages(counts, totals, layers, num_layers)
        to_target = target_loss(averages, totals.mean(), target, self.target_loss)
        return {
            "atp": (self.lambda_atp, atp_loss(counts, totals, layers)),
            "target": (self.lambda_target, to_target),
        }
