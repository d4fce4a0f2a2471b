"""Timing plain and pruned passes in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from atp_patch.patch import disabled, last_trace, require_patch
from atp_patch.trace import PruningTrace

Inputs = dict[str, Tensor]


@dataclass
class Times:
    """Milliseconds of the same work, run by run."""

    values_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """The median of the runs."""
        return statistics.median(self.values_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """Lower and upper quartile."""
        if len(self.values_ms) < 2:
            return self.values_ms[0], self.values_ms[0]
        low, _, high = statistics.quantiles(self.values_ms, n=4, method="inclusive")
        return low, high


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        prefill_plain, prefill_pruned: forward passes up to the next token's logits.
        decode_plain, decode_pruned: one token each, on the cache of such a prefill.
        overhead: scoring, choosing and gathering of one pruned prefill, timed in runs of its own.
        kv_bytes_plain, kv_bytes_pruned: measured from the caches.
        trace: of the last pruned pass.
    """

    prefill_plain: Times
    prefill_pruned: Times
    decode_plain: Times
    decode_pruned: Times
    overhead: Times
    kv_bytes_plain: int
    kv_bytes_pruned: int
    trace: PruningTrace

    @property
    def prefill_speedups(self) -> list[float]:
        """Plain over pruned for each pair of neighbouring runs."""
        pairs = zip(self.prefill_plain.values_ms, self.prefill_pruned.values_ms, strict=True)
        return [plain / pruned for plain, pruned in pairs]

    @property
    def prefill_speedup(self) -> float:
        """Ratio of medians."""
        return self.prefill_plain.median_ms / self.prefill_pruned.median_ms

    @property
    def flops_ratio(self) -> float:
        """Plain over pruned FLOPs of the decoder's prefill."""
        return self.trace.flops_plain / self.trace.flops

    @property
    def efficiency(self) -> float:
        """Prefill speed-up over FLOPs ratio: 1 means that every FLOP saved is time saved."""
        return self.prefill_speedup / self.flops_ratio

    @property
    def overhead_share(self) -> float:
        """Share of the pruned prefill that goes into scoring, choosing and gathering."""
        return self.overhead.median_ms / self.prefill_pruned.median_ms


def compare(model: nn.Module, inputs: Inputs, *, runs: int, decode_tokens: int) -> Comparison:
    """Time a patched model against itself with pruning off, alternating.

    Args:
        model: a patched model; ``inputs`` are on its device.
        runs: timed pairs, after one pair of warm-up.
        decode_tokens: tokens decoded after each prefill (0: none are timed).
    """
    prefill = {"plain": Times(), "pruned": Times()}
    decode = {"plain": Times(), "pruned": Times()}
    stored: dict[str, int] = {}
    with torch.inference_mode():
        for run in range(runs + 1):
            for kind in ("plain", "pruned"):
                with _kind(model, kind):
                    prefill_ms, decode_ms, cache = _one(model, inputs, decode_tokens)
                if run:
                    prefill[kind].values_ms.append(prefill_ms)
                    decode[kind].values_ms += decode_ms
                stored[kind] = cache_bytes(cache)
                del cache
        overhead = Times()
        for _ in range(runs):
            with timed_seam(model) as spent:
                _one(model, inputs, 0)
            overhead.values_ms.append(sum(spent))
    return Comparison(
        prefill["plain"],
        prefill["pruned"],
        decode["plain"],
        decode["pruned"],
        overhead,
        stored["plain"],
        stored["pruned"],
        last_trace(model),
    )


@contextmanager
def _kind(model: nn.Module, kind: str) -> Iterator[None]:
    if kind == "pruned":
        yield
    else:
        with disabled(model):
            yield


def _one(model: Any, inputs: Inputs, decode_tokens: int) -> tuple[float, list[float], DynamicCache]:
    """One prefill and some decoding steps: milliseconds, milliseconds a token, the cache."""
    prefill_ms, output, cache = _prefill(model, inputs)
    mask, decode_ms = inputs["attention_mask"], []
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    position = mask.sum(1, keepdim=True)
    for step in range(decode_tokens):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        before = _now(token.device)
        output = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=position + step,
            past_key_values=cache,
            use_cache=True,
        )
        decode_ms.append(_now(token.device) - before)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    return prefill_ms, decode_ms, cache


def _prefill(model: Any, inputs: Inputs) -> tuple[float, Any, DynamicCache]:
    cache = DynamicCache(config=model.config.get_text_config())
    before = _now(inputs["input_ids"].device)
    output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _now(inputs["input_ids"].device) - before, output, cache


def time_prefill(model: nn.Module, inputs: Inputs) -> float:
    """Milliseconds of one forward pass up to the next token's logits."""
    return _prefill(model, inputs)[0]


def _now(device: torch.device) -> float:
    """Milliseconds on a clock, once everything given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a cache holds."""
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def timed_seam(model: nn.Module) -> Iterator[list[float]]:
    """Collect the milliseconds that the patch itself takes in a forward pass: everything it does.

    The device is waited for around each piece, so a pass runs slower than it would otherwise.
    """
    seam = require_patch(model).seam
    device = next(model.parameters()).device
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = _now(device)
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(_now(device) - before)

        return call

    names = ("begin", "before_layer", "finish")
    for name in names:
        setattr(seam, name, timed(getattr(seam, name)))
    try:
        yield spent
    finally:
        for name in names:
            delattr(seam, name)
