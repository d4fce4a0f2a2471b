"""Setting learned thresholds to a budget on unlabelled data, and controls with which adaptive
thresholds are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from atp_patch.contract import LayerMethod, LearnedThresholds
from atp_patch.contract.errors import BudgetError, ConfigError, InputError
from atp_patch.maths import average_tokens
from atp_patch.methods.atp_given import GivenThresholds
from atp_patch.methods.atp_heads import Thresholds
from atp_patch.patching.api import require_patch
from atp_patch.patching.evaluating import evaluating
from atp_patch.patching.patch import Patch

CONTROLS = ("mean", "shuffled")
WITHIN = 0.01  # a calibrated average is off its target by this share at most
_ROUNDS, _EDGE = 3, 30.0  # logits beyond the edge are 0 and 1 in float32
Batch = Mapping[str, Any]


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
    model: nn.Module, batches: Iterable[Batch], target_tokens: float | None = None
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

    Returns:
        A :class:`Calibration`; ``after`` is within 1 % of the target.

    Raises:
        ConfigError: where the patch has no learned thresholds, or scores tie so much that no shift
            comes within 1 %.
        BudgetError: where no thresholds could keep so few, or so many.
        InputError: where the data has no images.
    """
    patch, data = require_patch(model), list(batches)
    module = _thresholds(patch)
    with _whole(module):
        start = {name: value.clone() for name, value in module.state_dict().items()}
    shifts = dict.fromkeys(patch.layers, 0.0)
    try:
        with evaluating(model):
            first = seen = _observe(model, data, None)
            target = patch.config.goal(first.total) if target_tokens is None else target_tokens
            counts = _scaled(first, patch, target)
            for _ in range(_ROUNDS):
                if abs(seen.average - target) <= WITHIN * target:
                    break
                for layer, wanted in counts.items():
                    shifts[layer] += _meet(model, data, module, layer, wanted)
                seen = _observe(model, data, None)
        if abs(seen.average - target) > WITHIN * target:
            raise ConfigError(
                f"the nearest that a shift of all thresholds comes to {target:g} tokens is "
                f"{seen.average:.1f}; give more data, or scores that tie less (of atp: "
                "score_norm='rank', spatial_order='progressive', and spatial_share below 1)."
            )
    except BaseException:  # Ctrl-C too must not leave half of the shifts behind
        with _whole(module):
            module.load_state_dict(start)
        raise
    if target_tokens is not None:
        patch.config = replace(patch.config, keep=None, target_tokens=float(target_tokens))
    return Calibration(float(target), first.average, seen.average, shifts, seen.samples)


def threshold_control(model: nn.Module, batches: Iterable[Batch], kind: str) -> GivenThresholds:
    """Make thresholds that do not adapt to the instance, for :func:`controlled`.

    At every pruning layer they keep as many tokens of the data on average as the model's own
    thresholds do. If an adaptive method is no better with its own, it has learned nothing about
    single instances.

    Args:
        model: as in :func:`calibrate`.
        batches: as in :func:`calibrate`.
        kind: "mean": every instance gets the data's mean thresholds; "shuffled": every instance
            gets those of another one, drawn from the data.

    Raises:
        ConfigError: for another kind, or where the patch has no learned thresholds.
        InputError: where the data has no images.
    """
    if kind not in CONTROLS:
        raise ConfigError(f"kind={kind!r} is not one of {', '.join(CONTROLS)}.")
    patch, data = require_patch(model), list(batches)
    _adaptive(patch)
    with evaluating(model):
        own = _observe(model, data, None)
        tables = own.thetas
        if kind == "mean":
            tables = {layer: table.mean(0, keepdim=True) for layer, table in tables.items()}
        logits = {layer: torch.logit(table, eps=1e-6).float() for layer, table in tables.items()}
        control = GivenThresholds(logits)
        with controlled(model, control):
            for layer, wanted in own.counts.items():
                _meet(model, data, control, layer, wanted)
    return control


@contextmanager
def controlled(model: nn.Module, control: GivenThresholds) -> Iterator[None]:
    """Replace a model's thresholds by a control inside this context and in this thread.

    Adapters that are saved meanwhile contain the model's own thresholds.

    Args:
        model: as in :func:`calibrate`.
        control: what :func:`threshold_control` made of this patch.

    Raises:
        ConfigError: where the control belongs to other layers, or the thresholds are not ATP's.
    """
    patch = require_patch(model)
    _adaptive(patch)
    if control.layers != patch.layers:
        raise ConfigError(
            f"these thresholds are for layers {list(control.layers)}, the model prunes before "
            f"{list(patch.layers)}; make them from this patch."
        )
    thread = patch.thread
    before, thread.control = thread.control, control
    try:
        yield
    finally:
        thread.control = before


@dataclass
class _Seen:
    """What one pass over the data showed.

    Attributes:
        samples: how many samples have images.
        visual: visual tokens of a sample on average, before anything is pruned or merged.
        total: visual tokens of a sample on average that enter the decoder.
        counts: for each pruning layer the visual tokens of a sample that are left, on average.
        average: visual tokens averaged over all decoder layers and samples.
        thetas: for each pruning layer (samples, thresholds of the method), in the order of their
            names.
        margins: for each token that reached the layer asked for, the margin by which it passes the
            thresholds, as the method counts it; infinite where it stays at any thresholds.
    """

    samples: int
    visual: float
    total: float
    counts: dict[int, float]
    average: float
    thetas: dict[int, Tensor]
    margins: Tensor


def _observe(model: nn.Module, data: Sequence[Batch], layer: int | None) -> _Seen:
    visual: list[int] = []
    rows: list[Tensor] = []  # tokens that enter each decoder layer
    patch = require_patch(model)
    kept: dict[int, list[int]] = {i: [] for i in patch.layers}
    thetas: dict[int, list[Tensor]] = {i: [] for i in kept}
    margins: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    # Offloaded weights are on no device; accelerate's hooks then move the inputs themselves.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    method = patch.method
    assert method is not None  # as _thresholds has made sure
    for batch in data:
        patch.thread.trace = None
        with torch.no_grad():
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        if patch.thread.trace is None:  # the batch is text alone
            continue
        trace = patch.thread.trace
        seen = [b for b, total in enumerate(trace.layout.totals) if total]
        visual += [trace.layout.totals[b] for b in seen]
        rows.append(trace.tokens_per_layer[seen].double())
        for i in kept:
            record = trace.layers[i]
            kept[i] += [record.kept_counts[b] for b in seen]
            found = [record.thresholds[name] for name in sorted(record.thresholds)]
            if found:
                thetas[i].append(torch.stack(found, 1)[seen].double().cpu())
        if layer is not None:
            margins.append(_margins(trace.layers[layer], method))
    if not visual:
        raise InputError("no batch has images; thresholds are set on samples with images.")
    entering = torch.cat(rows)
    samples = len(visual)
    return _Seen(
        samples=samples,
        visual=sum(visual) / samples,
        total=float(entering[:, 0].mean()),
        counts={i: sum(values) / samples for i, values in kept.items()},
        average=float(entering.mean()),
        thetas={i: torch.cat(tables) for i, tables in thetas.items() if tables},
        margins=torch.cat(margins),
    )


def _margins(record: Any, method: LayerMethod) -> Tensor:
    margins = method.margins(record.decision).double()
    by_a_minimum = record.decision.keep & (margins < -1e-5)
    return margins.masked_fill(by_a_minimum, torch.inf)[record.token_valid].cpu()


def _meet(
    model: nn.Module, data: Sequence[Batch], module: LearnedThresholds, layer: int, wanted: float
) -> float:
    """Shift one layer's thresholds so that ``wanted`` tokens of a sample stay; return the shift."""
    seen = _observe(model, data, layer)
    ranked = seen.margins.sort(descending=True).values.clamp(-_EDGE, _EDGE)
    ranked = torch.cat([ranked.new_tensor([_EDGE]), ranked, ranked.new_tensor([-_EDGE])])
    place = min(round(wanted * seen.samples), len(ranked) - 2)
    by = float((ranked[place] + ranked[place + 1]) / 2)
    with _whole(module):
        module.shift(layer, by)
    return by


def _whole(module: nn.Module) -> AbstractContextManager[object]:
    """A context inside which parameters are whole that DeepSpeed's ZeRO-3 divides among processes.
    What the first process changes in them is kept.
    """
    parts = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parts:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    gathered: AbstractContextManager[object] = GatheredParameters(parts, modifier_rank=0)
    return gathered


def _scaled(seen: _Seen, patch: Patch, target: float) -> dict[int, float]:
    """The seen counts of each pruning layer, scaled so that their average is the target."""
    layers, num_layers = patch.layers, patch.config.base.num_layers
    least = average_tokens(seen.total, [1.0] * len(layers), layers, num_layers)
    if not least <= target <= seen.total:
        raise BudgetError(
            f"target_tokens={target:g} is not between {least:.1f}, which the layers before the "
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


def _adaptive(patch: Patch) -> None:
    """Refuse thresholds that are not ATP's, because there are no controls for others."""
    if not isinstance(_thresholds(patch), Thresholds):
        raise ConfigError(
            f"there are controls for the learned thresholds of atp, not for those of "
            f"{patch.config.name}."
        )


def _thresholds(patch: Patch) -> LearnedThresholds:
    if not isinstance(patch.learned_module, LearnedThresholds):
        raise ConfigError(
            "this patch has no learned thresholds: budgets are met without them. Patch with "
            'method="atp", thresholds="learned", with an adapter that brings them, or with a '
            "method of your own whose module is an atp_patch.LearnedThresholds."
        )
    if not patch.seam.thread.enabled:
        raise ConfigError(
            "nothing is pruned within atp_patch.disabled(model); call this outside it."
        )
    if any(parameter.is_meta for parameter in patch.learned_module.parameters()):
        raise ConfigError(
            "the threshold heads were offloaded with the model; offload it first, then patch it."
        )
    return patch.learned_module
