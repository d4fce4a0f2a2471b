"""Where a pruned prefill's time goes: the plain model at the lengths that pruning leaves.

Fewer tokens make smaller matrices, which a machine may multiply at fewer FLOPs a second. What the
plain model needs at the same lengths is the least that any pruning can reach there; the rest is
the patch's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atp_patch.bench.clock import Times
from atp_patch.bench.measure import Contender, Inputs, time_prefill, turned
from atp_patch.patching.trace import PruningTrace


@dataclass
class SameLengths:
    """What :func:`time_same_lengths` found.

    Attributes:
        layer_lengths: tokens that each decoder layer sees in the pruned pass.
        plain: the plain model's decoder at each of these lengths, all layers.
        pruned: the pruned prefill, in turns with those.
    """

    layer_lengths: list[int]
    plain: dict[int, Times]
    pruned: Times

    @property
    def least_ms(self) -> float:
        """Milliseconds of a prefill whose layers take what plain layers take at their lengths."""
        depth = len(self.layer_lengths)
        return math.fsum(self.plain[n].median_ms / depth for n in self.layer_lengths)

    @property
    def reached(self) -> float:
        """Share of the speed-up possible on this machine at these lengths that was reached."""
        return self.least_ms / self.pruned.median_ms


def time_same_lengths(
    model: nn.Module, contender: Contender, inputs: Inputs, trace: PruningTrace, *, runs: int
) -> SameLengths:
    """Time a contender in turns with the plain model on text of its layers' lengths.

    Args:
        model: the plain model; ``inputs`` are on its device and give ``trace`` when patched.
        runs: timed rounds, after one of warm-up.
    """
    lengths = layer_lengths(trace)
    plain = {length: Times() for length in lengths}
    pruned = Times()
    with torch.inference_mode():
        for run in range(runs + 1):
            for length in turned([None, *plain], run):
                if length is None:
                    with contender.applied():
                        times, spent_ms = pruned, time_prefill(model, inputs)
                else:
                    times, spent_ms = plain[length], time_prefill(model, _text(inputs, length))
                if run:
                    times.values_ms.append(spent_ms)
    return SameLengths(lengths, plain, pruned)


def layer_lengths(trace: PruningTrace) -> list[int]:
    """Tokens of the longest sample at each decoder layer, text included."""
    lengths = trace.tokens_per_layer + torch.tensor(trace.text_tokens)[:, None]
    return [int(n) for n in lengths.amax(0)]


def _text(inputs: Inputs, length: int) -> dict[str, Any]:
    batch = inputs["input_ids"].shape[0]
    ids = torch.full((batch, length), 3, device=inputs["input_ids"].device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
