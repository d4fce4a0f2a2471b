"""Where the time of a pruned prefill goes, found by timing the plain model at the same lengths.

Fewer tokens make smaller matrices, which a machine may multiply at fewer FLOPs per second. The time
that the plain model takes at the lengths that pruning leaves is the least that any pruning can
reach there; the rest of the time is the patch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atp_patch.bench.clock import Times
from atp_patch.bench.measure import Contender, Inputs, in_turn, time_prefill
from atp_patch.patching.trace import PruningTrace


@dataclass
class SameLengths:
    """What :func:`time_same_lengths` found.

    Attributes:
        layer_lengths: number of tokens in each decoder layer of the pruned forward pass.
        plain: for each of these lengths, times of all layers of the plain model's decoder.
        pruned: times of the pruned decoder, measured in turn with those.
    """

    layer_lengths: list[int]
    plain: dict[int, Times]
    pruned: Times

    @property
    def least_ms(self) -> float:
        """Milliseconds of a prefill whose layers each take as long as a plain layer at the same
        length.
        """
        depth = len(self.layer_lengths)
        return math.fsum(self.plain[n].median_ms / depth for n in self.layer_lengths)

    @property
    def reached(self) -> float:
        """The share that was reached of the speed-up that this machine allows at these lengths."""
        return self.least_ms / self.pruned.median_ms


def time_same_lengths(
    model: nn.Module,
    contender: Contender,
    inputs: Inputs,
    trace: PruningTrace,
    *,
    runs: int,
    advance: Callable[[int], object] = lambda rounds: None,
) -> SameLengths:
    """Time a contender in turn with the plain model on text as long as each of its layers sees.

    Args:
        model: the plain model.
        contender: prunes the model.
        inputs: on the model's device.
        trace: the trace of the contender on these inputs.
        runs: timed rounds, which follow one round of warm-up.
        advance: is called with the number of rounds that have ended since the call before.
    """
    lengths = layer_lengths(trace)
    plain = {length: Times() for length in lengths}
    pruned = Times()
    with torch.inference_mode():
        for round_number in range(runs + 1):
            for length in in_turn([None, *plain], round_number):
                if length is None:
                    with contender.applied():
                        times, spent_ms = pruned, time_prefill(model, inputs)
                else:
                    times, spent_ms = plain[length], time_prefill(model, _text(inputs, length))
                if round_number:
                    times.values_ms.append(spent_ms)
            advance(1)
    return SameLengths(lengths, plain, pruned)


def layer_lengths(trace: PruningTrace) -> list[int]:
    """The number of tokens of the longest sample in each decoder layer, with the text."""
    lengths = trace.tokens_per_layer + torch.tensor(trace.text_tokens)[:, None]
    return [int(n) for n in lengths.amax(0)]


def _text(inputs: Inputs, length: int) -> dict[str, Any]:
    batch = inputs["input_ids"].shape[0]
    ids = torch.full((batch, length), 3, device=inputs["input_ids"].device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
