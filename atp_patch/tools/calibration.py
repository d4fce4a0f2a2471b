"""Setting learned thresholds to a budget on unlabelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn

from atp_patch.contract.errors import BudgetError, ConfigError
from atp_patch.maths import average_tokens
from atp_patch.patching.api import require_patch
from atp_patch.patching.evaluating import evaluating
from atp_patch.patching.patch import Patch
from atp_patch.tools.observation import (
    Batch,
    Observation,
    learned_thresholds,
    meet_count,
    observe,
    whole,
)

WITHIN = 0.01  # a calibrated average is off its target by this share at most
_ROUNDS = 3


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` did. Visual tokens are averaged over all decoder layers and the data.

    Attributes:
        target: the visual tokens that were asked for.
        before: the visual tokens that the data kept before.
        after: the visual tokens that the data keeps now.
        shifts: for each pruning layer the number that was added to the logits of its thresholds.
        samples: how many samples of the data have images.
    """

    target: float
    before: float
    after: float
    shifts: dict[int, float]
    samples: int


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    target_tokens: float | None = None,
    *,
    advance: Callable[[int], object] = lambda passes: None,
) -> Calibration:
    """Shift learned thresholds, trained or not, so that the data keeps ``target_tokens``.

    Layer by layer, one number is added to the thresholds of all instances (of ATP: to the logits of
    both), so that their differences stay, and the proportion of tokens between the layers too. The
    number is a quantile, over the data, of the margins by which tokens pass the thresholds.
    Adapters that are saved afterwards contain the shift.

    Args:
        model: patched with ``thresholds="learned"``, with an adapter that brings them, or with any
            method whose module is a :class:`~atp_patch.LearnedThresholds`.
        batches: inputs of the model with images: a few dozen samples like those of later use. They
            stay in memory and are read several times. No labels are needed; where there are some,
            the tokens of the answers do not count, as in training.
        target_tokens: visual tokens averaged over all decoder layers and the data; by default the
            budget that the patch was made with.
        advance: is called with the number of passes over the data that have ended since the call
            before, for a progress bar. A round takes one pass for each pruning layer and one more.

    Returns:
        A :class:`Calibration`; ``after`` is within 1 % of the target.

    Raises:
        ConfigError: where the patch has no learned thresholds, or scores tie so much that no shift
            comes within 1 %.
        BudgetError: where no thresholds could keep so few, or so many.
        InputError: where the data has no images.
    """
    patch, data = require_patch(model), list(batches)
    module = learned_thresholds(patch)
    with whole(module):
        start = {name: value.clone() for name, value in module.state_dict().items()}
    shifts = dict.fromkeys(patch.layers, 0.0)
    try:
        with evaluating(model):
            first = seen = observe(model, data, None)
            advance(1)
            target = patch.config.goal(first.total) if target_tokens is None else target_tokens
            counts = _scaled(first, patch, target)
            for _ in range(_ROUNDS):
                if abs(seen.average - target) <= WITHIN * target:
                    break
                for layer, wanted in counts.items():
                    shifts[layer] += meet_count(model, data, module, layer, wanted)
                    advance(1)
                seen = observe(model, data, None)
        if abs(seen.average - target) > WITHIN * target:
            raise ConfigError(
                f"the nearest that a shift of all thresholds comes to {target:g} tokens is "
                f"{seen.average:.1f}; give more data, or scores that tie less (of atp: "
                "score_norm='rank', spatial_order='progressive', and spatial_share below 1)."
            )
    except BaseException:  # Ctrl-C too must not leave half of the shifts behind
        with whole(module):
            module.load_state_dict(start)
        raise
    if target_tokens is not None:
        patch.config = replace(
            patch.config, keep=None, target_share=None, target_tokens=float(target_tokens)
        )
    return Calibration(float(target), first.average, seen.average, shifts, seen.samples)


def _scaled(seen: Observation, patch: Patch, target: float) -> dict[int, float]:
    """Return the seen counts of each pruning layer, scaled so that their average is the target."""
    layers, num_layers = patch.layers, patch.config.base.num_layers
    lowest = average_tokens(seen.total, [1.0] * len(layers), layers, num_layers)
    if not lowest <= target <= seen.total:
        raise BudgetError(
            f"target_tokens={target:g} is not between {lowest:.1f}, which the layers before the "
            f"first pruning cost, and {seen.total:g}, all that enter the decoder; give one that is."
        )

    def counts(scale: float) -> list[float]:
        return [min(max(scale * c, 1.0), seen.total) for c in seen.counts.values()]

    low, high = 0.0, seen.total
    for _ in range(60):
        middle = (low + high) / 2
        below = average_tokens(seen.total, counts(middle), layers, num_layers) < target
        low, high = (middle, high) if below else (low, middle)
    return dict(zip(layers, counts(high), strict=True))
