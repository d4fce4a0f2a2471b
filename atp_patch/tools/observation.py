"""What data shows of learned thresholds, and shifting them so that the data keeps a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atp_patch.contract import LayerMethod, LearnedThresholds
from atp_patch.contract.errors import ConfigError, InputError
from atp_patch.patching.api import require_patch
from atp_patch.patching.patch import Patch

_EDGE = 30.0  # logits beyond the edge are 0 and 1 in float32
Batch = Mapping[str, Any]


def learned_thresholds(patch: Patch) -> LearnedThresholds:
    """Return the module of a patch's thresholds.

    Raises:
        ConfigError: where it has none that can be read and shifted now.
    """
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


@dataclass
class Observation:
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


def observe(model: nn.Module, data: Sequence[Batch], layer: int | None) -> Observation:
    """Run the data through the model once.

    Args:
        model: a model with learned thresholds.
        data: inputs of the model.
        layer: the pruning layer whose margins are wanted, or None.

    Raises:
        InputError: where the data has no images.
    """
    visual: list[int] = []
    rows: list[Tensor] = []  # tokens that enter each decoder layer
    patch = require_patch(model)
    kept: dict[int, list[int]] = {i: [] for i in patch.layers}
    thetas: dict[int, list[Tensor]] = {i: [] for i in kept}
    margins: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    # Offloaded weights are on no device; accelerate's hooks then move the inputs themselves.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    method = patch.method
    assert method is not None  # as learned_thresholds has made sure
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
            layer_trace = trace.layers[i]
            kept[i] += [layer_trace.kept_counts[b] for b in seen]
            found = [layer_trace.thresholds[name] for name in sorted(layer_trace.thresholds)]
            if found:
                thetas[i].append(torch.stack(found, 1)[seen].double().cpu())
        if layer is not None:
            margins.append(_margins(trace.layers[layer], method))
    if not visual:
        raise InputError("no batch has images; thresholds are set on samples with images.")
    entering = torch.cat(rows)
    samples = len(visual)
    return Observation(
        samples=samples,
        visual=sum(visual) / samples,
        total=float(entering[:, 0].mean()),
        counts={i: sum(values) / samples for i, values in kept.items()},
        average=float(entering.mean()),
        thetas={i: torch.cat(tables) for i, tables in thetas.items() if tables},
        margins=torch.cat(margins),
    )


def _margins(layer_trace: Any, method: LayerMethod) -> Tensor:
    margins = method.margins(layer_trace.decision).double()
    by_a_minimum = layer_trace.decision.keep & (margins < -1e-5)
    return margins.masked_fill(by_a_minimum, torch.inf)[layer_trace.token_valid].cpu()


def meet_count(
    model: nn.Module, data: Sequence[Batch], module: LearnedThresholds, layer: int, wanted: float
) -> float:
    """Shift one layer's thresholds so that ``wanted`` tokens of a sample stay; return the shift."""
    seen = observe(model, data, layer)
    ranked = seen.margins.sort(descending=True).values.clamp(-_EDGE, _EDGE)
    ranked = torch.cat([ranked.new_tensor([_EDGE]), ranked, ranked.new_tensor([-_EDGE])])
    place = min(round(wanted * seen.samples), len(ranked) - 2)
    by = float((ranked[place] + ranked[place + 1]) / 2)
    with whole(module):
        module.shift(layer, by)
    return by


def whole(module: nn.Module) -> AbstractContextManager[object]:
    """Return a context inside which parameters are whole that DeepSpeed's ZeRO-3 divides among
    processes. What the first process changes in them is kept.
    """
    parts = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parts:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    gathered: AbstractContextManager[object] = GatheredParameters(parts, modifier_rank=0)
    return gathered
