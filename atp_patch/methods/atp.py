"""ATP-LLaVA (Ye et al., 2024): adaptive token pruning.

Scores of eq. 3-5 come from the post-rotary q and k of the layer before; a token goes on where its
redundant score or its spatial score reaches the threshold for this layer and instance (eq. 9-11
with hard decisions). Thresholds are predicted by small heads (eq. 6-8) or set to a budget.
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
    least_counts,
)
from atp_patch.methods.fixed import Scored

_STEEPEST = 1e9  # slope of a sigmoid; the paper's 1e6 is a step already
_WIDEST, _FINEST = 4096, 128  # width of z, and side of the grid that it sees
_NEVER = -1e4  # so far below every threshold that its sigmoid is 0


@dataclass(frozen=True)
class ATP(Scored):
    """Adaptive token pruning with spatial augmented pruning.

    Attributes:
        thresholds: "budget" (no training: thresholds that keep exactly the budget, for every layer
            and instance) or "learned" (predicted by heads; adapters bring their weights).
        spatial_order: "progressive" (eq. 5 with every rate) or "strided" (a few sampling rates).
        lambda_sample: eq. 5's scaling coefficient.
        spatial_share: part of a budget that the spatial score gets. Learned thresholds start so;
            with 0 or 1 one of the scores is left out for good.
        surrogate: how learned thresholds get a gradient: "straight-through" (hard decisions
            forward, sigmoids of slope ``slope`` backward) or "literal" (eq. 9-11 with temperature
            ``slope``, 1e6 in the paper).
        slope_end, anneal_passes: the slope goes geometrically from ``slope`` to ``slope_end``
            over so many forward passes in training (micro-batches, where gradients are
            accumulated). A counter beside the heads' weights keeps the place; neither: no change.
        detach_scores: keep the thresholds' gradient out of the scores and the question's state, and
            so out of the decoder.
        lambda_atp, lambda_target, target_loss: weights of eq. 14, and the kind of eq. 13
            ("paper", "smooth" or "unbiased": see ``maths.target_loss``). The paper's
            ``lambda_atp`` is 0.01 to 0.1, its kind "paper"; docs/results.md compares them.
        budget_gradient: what eq. 12 and 13 move: all of the heads ("all", the paper's), or only the
            thresholds' own biases ("biases"), which are the same for every instance: what tells
            instances apart then learns from the answers alone.
        threshold_inputs: what heads see: "scores" (the paper's), or "scores+question", the hidden
            state of the last prompt token too. Answers never count.
        standardise: heads see S_self and log S_cross with mean 0 and variance 1 over an instance's
            surviving tokens, instead of the scores as they are (the paper's).
        heads_hidden_size, reference_grid: width of z, and the side of the grid its input is brought
            to.
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
                "together: the slope to end at, and after how many passes; or neither."
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
        """Scores that learned thresholds are compared with: both, or the one that has it all."""
        left_out = {0.0: "spatial", 1.0: "redundant"}.get(self.spatial_share)
        return tuple(name for name in ("redundant", "spatial") if name != left_out)

    @property
    def needs_budget(self) -> bool:
        """Learned thresholds decide how many tokens stay by themselves."""
        return self.thresholds == "budget"

    @property
    def takes_budget(self) -> bool:
        """Learned thresholds aim at a budget, but keep no given count."""
        return self.needs_budget

    def build(self, spec: ModuleSpec) -> nn.Module | None:
        """The threshold heads, where thresholds are learned."""
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
        """Eq. 3-11 with hard decisions."""
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
            best = top_k_mask(scores[self.compared[0]], view.slot_valid, least_counts(view))
            first = best if first is None else first | best
            redundant_or_never, spatial_or_never = (
                score if name in self.compared else torch.full_like(score, _NEVER)
                for name, score in scores.items()
            )
            compared = redundant_or_never, spatial_or_never
        else:
            free, counts = view.slot_valid, view.counts_tensor()
            if first is not None:  # these stay anyway; the budget is spread over the others
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
        """As :meth:`LayerMethod.margins`, of the scores that are compared."""
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
        """L_atp and L_target of eq. 12-13 with their weights of eq. 14."""
        averages = layer_averages(counts, totals, layers, num_layers)
        to_target = target_loss(averages, totals.mean(), target, self.target_loss)
        return {
            "atp": (self.lambda_atp, atp_loss(counts, totals, layers)),
            "target": (self.lambda_target, to_target),
        }
