"""Time and memory of training steps, forward and backward, of the plain and the patched model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atp_patch.bench.clock import Times, between_ms, mark, peak_bytes, reset_peak
from atp_patch.bench.comparison_tables import listing
from atp_patch.bench.measure import in_turn
from atp_patch.patching.api import patch_model, unpatch_model
from atp_patch.patching.patch import MODULE_NAME

IGNORE = -100
ANSWER_SHARE = 0.25  # the last quarter of the text tokens is the answer, which is learned


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: what tables call it.
        patched: whether the model is patched with learned thresholds, whose heads learn then.
        decoder: whether the decoder and the output head learn.
    """

    name: str
    patched: bool
    decoder: bool


WAYS = (
    Way("plain, decoder learns", patched=False, decoder=True),
    Way("atp, decoder learns", patched=True, decoder=True),
    Way("atp, heads alone", patched=True, decoder=False),
)


@dataclass
class Steps:
    """What was measured of one way to train.

    Attributes:
        step: times of forward and backward pass.
        peak_bytes: the most memory in use, weights included; None where the machine does not tell.
    """

    step: Times = field(default_factory=Times)
    peak_bytes: int | None = None


def compare_steps(
    model: Any,
    layers: Sequence[int],
    inputs: dict[str, Tensor],
    text: Tensor,
    *,
    runs: int,
    gradient_checkpointing: bool = False,
    advance: Callable[[int], object] = lambda steps: None,
) -> dict[str, Steps]:
    """Time the steps of all ways in turn.

    No optimizer runs, because the time of its own work does not depend on what is pruned.

    Args:
        model: the plain model.
        layers: before which the patched model prunes; in training it runs at full length.
        inputs: on the model's device.
        text: (B, L) bool, which is false at visual tokens.
        runs: timed rounds, which follow one round of warm-up.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        advance: is called with the number of steps that have ended since the call before.
    """
    found = {way.name: Steps() for way in WAYS}
    labels = _labels(inputs["input_ids"], text)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for round_number in range(runs + 1):
        for way in in_turn(WAYS, round_number):
            one = found[way.name]
            if way.patched:
                patch_model(model, layers, "atp", thresholds="learned")
            try:
                elapsed_ms, peak = _step(model, way, inputs, labels)
            finally:
                if way.patched:
                    unpatch_model(model)
            one.peak_bytes = peak if one.peak_bytes is None else max(one.peak_bytes, peak or 0)
            if round_number:
                one.step.values_ms.append(elapsed_ms)
            advance(1)
    model.requires_grad_(True).eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return found


def _labels(ids: Tensor, text: Tensor) -> Tensor:
    """Labels (B, L): the ids of the last text tokens, and IGNORE elsewhere."""
    rank = text.flip(1).cumsum(1).flip(1)  # 1 for the last text token, 2 for the one before it
    answer = text & (rank <= (text.sum(1, keepdim=True) * ANSWER_SHARE).ceil())
    return torch.where(answer, ids, IGNORE)


def _step(
    model: Any, way: Way, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[float, int | None]:
    model.requires_grad_(False)
    if way.decoder:
        model.get_decoder().requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if way.patched:
        getattr(model, MODULE_NAME).requires_grad_(True)
    model.train()
    gc.collect()
    device = labels.device
    reset_peak(device)
    start = mark(device)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    elapsed_ms = between_ms(start, mark(device))
    peak = peak_bytes(device)
    model.zero_grad(set_to_none=True)
    return elapsed_ms, peak


def as_data(found: dict[str, Steps]) -> dict[str, Any]:
    """What was measured as plain data, with the times of patched steps relative to plain ones."""
    plain = found[WAYS[0].name]
    return {
        name: {
            "step_ms": one.step.spread(),
            "peak_bytes": one.peak_bytes,
            "time_ratio": one.step.median_ms / plain.step.median_ms,
            "memory_ratio": one.peak_bytes / plain.peak_bytes
            if one.peak_bytes is not None and plain.peak_bytes
            else None,
        }
        for name, one in found.items()
    }


def steps_table(case: dict[str, Any]) -> str:
    """The table of one case, with a row for each way."""
    rows = []
    for name, one in case["ways"].items():
        spread, peak = one["step_ms"], one["peak_bytes"]
        rows.append(
            [
                name,
                f"{spread['median']:.0f} [{spread['q1']:.0f}, {spread['q3']:.0f}]",
                f"{one['time_ratio']:.2f}",
                "-" if peak is None else f"{peak / 1e9:.2f}",
                "-" if one["memory_ratio"] is None else f"{one['memory_ratio']:.2f}",
            ]
        )
    return listing(case, ["training step", "ms", "of plain", "peak memory GB", "of plain"], rows)
