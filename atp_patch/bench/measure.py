"""Timing several ways to run one model, in turn and in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from atp_patch.bench.clock import Times, between_ms, mark, peak_bytes, reset_peak
from atp_patch.patching.api import last_trace, patch_model, require_patch, unpatch_model
from atp_patch.patching.trace import PruningTrace
from atp_patch.seam import CACHE_ARGUMENT

Inputs = dict[str, Tensor]
Way = TypeVar("Way")
PLAIN = "plain"


@dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        name: what tables call it.
        applied: makes a context inside which the model runs this way.
        prunes: whether the model is patched then, so that there is a trace.
    """

    name: str
    applied: Callable[[], AbstractContextManager[None]] = nullcontext
    prunes: bool = True


def patched(model: nn.Module, name: str, settings: dict[str, Any]) -> Contender:
    """A contender that patches a plain model for each round, and unpatches it again.

    Args:
        model: the plain model.
        name: what tables call the contender.
        settings: arguments of ``patch_model``.
    """

    @contextmanager
    def applied() -> Iterator[None]:
        patch_model(model, **settings)
        try:
            yield
        finally:
            unpatch_model(model)

    return Contender(name, applied)


@dataclass
class Measured:
    """What was measured of one contender.

    Attributes:
        prefill: times of forward passes up to the next token's logits (time to first token).
        vision: the part of each that the vision tower and the projector take.
        decoder: the rest of each.
        decode: times of single tokens that are decoded on the cache of such a prefill.
        overhead: times of scoring, choosing, merging and gathering in a pruned prefill, from
            further runs.
        kv_bytes: size of the keys and values in the cache after the prefill.
        state_bytes: size of the recurrent and convolution states in it, of layers without keys.
        peak_bytes: the most memory in use; None where the machine does not tell.
        trace: the trace of the last pruned forward pass.
    """

    prefill: Times = field(default_factory=Times)
    vision: Times = field(default_factory=Times)
    decoder: Times = field(default_factory=Times)
    decode: Times = field(default_factory=Times)
    overhead: Times = field(default_factory=Times)
    kv_bytes: int = 0
    state_bytes: int = 0
    peak_bytes: int | None = None
    trace: PruningTrace | None = None


def compare(
    model: nn.Module,
    contenders: Sequence[Contender],
    inputs: Inputs,
    *,
    runs: int,
    decode_tokens: int,
    with_overhead: bool = True,
    advance: Callable[[int], object] = lambda passes: None,
) -> dict[str, Measured]:
    """Time contenders in turn.

    Args:
        model: the plain model.
        contenders: the ways to run it.
        inputs: on the model's device.
        runs: timed rounds, which follow one round of warm-up.
        decode_tokens: number of tokens decoded after each prefill; 0: none are.
        with_overhead: whether to time scoring, choosing and gathering too, in further runs.
        advance: is called with the number of passes that have ended since the call before.

    Returns:
        what was measured of each contender, by its name.
    """
    found = {contender.name: Measured() for contender in contenders}
    device = inputs["input_ids"].device
    with torch.inference_mode():
        for round_number in range(runs + 1):
            for contender in in_turn(contenders, round_number):
                one = found[contender.name]
                reset_peak(device)
                with contender.applied():
                    passed = _prefill(model, inputs)
                    steps = _decode(model, inputs, passed, decode_tokens)
                    if contender.prunes:
                        one.trace = last_trace(model)
                peak = peak_bytes(device)
                one.peak_bytes = peak if peak is None else max(peak, one.peak_bytes or 0)
                one.kv_bytes = cache_bytes(passed.cache)
                one.state_bytes = state_bytes(passed.cache)
                if round_number:
                    _note(one, passed, steps)
                del passed  # its cache must not count in the next contender's peak
                advance(1)
        for contender in (c for c in contenders if c.prunes and with_overhead):
            for _ in range(runs):
                with contender.applied(), timed_seam(model) as spent:
                    _prefill(model, inputs)
                    found[contender.name].overhead.values_ms.append(spent())
                advance(1)
    return found


def in_turn(ways: Sequence[Way], round_number: int) -> list[Way]:
    """The order of the ways in a round, which begins with another one in every round.

    So each way has each place in a round equally often, and what an earlier run leaves behind, such
    as a warm machine, favours none.
    """
    first = round_number % len(ways)
    return [*ways[first:], *ways[:first]]


@dataclass(frozen=True)
class _Prefill:
    total_ms: float
    vision_ms: float
    logits: Tensor
    cache: DynamicCache


def _note(one: Measured, passed: _Prefill, steps: list[float]) -> None:
    one.prefill.values_ms.append(passed.total_ms)
    one.vision.values_ms.append(passed.vision_ms)
    one.decoder.values_ms.append(passed.total_ms - passed.vision_ms)
    one.decode.values_ms += steps


def _prefill(model: Any, inputs: Inputs) -> _Prefill:
    device = inputs["input_ids"].device
    cache = DynamicCache(config=model.config.get_text_config())
    with _timed(_base(model), ("get_image_features",), device) as vision_ms:
        start = mark(device)
        output = model(**inputs, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        total_ms = between_ms(start, mark(device))
        return _Prefill(total_ms, vision_ms(), output.logits[:, -1], cache)


def _decode(model: Any, inputs: Inputs, passed: _Prefill, tokens: int) -> list[float]:
    mask, times = inputs["attention_mask"], []
    token = passed.logits.argmax(-1, keepdim=True)
    for _ in range(tokens):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        start = mark(token.device)
        output = model(
            input_ids=token,
            attention_mask=mask,
            use_cache=True,
            **last_positions(model, mask),
            **{CACHE_ARGUMENT: passed.cache},
        )
        times.append(between_ms(start, mark(token.device)))
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    return times


def last_positions(model: Any, mask: Tensor, tokens: int = 1) -> dict[str, Tensor]:
    """The argument ``position_ids`` for the last tokens of a prompt, as ``generate`` makes it for
    M-RoPE; nothing for other models, which find the positions themselves.

    Args:
        model: has read the prompt's images already.
        mask: (B, L) attention mask of the whole prompt.
        tokens: how many tokens, all of them behind the images.
    """
    deltas = getattr(_base(model), "rope_deltas", None)
    if deltas is None:
        return {}
    steps = torch.arange(-tokens, 0, device=mask.device)
    return {"position_ids": (mask.sum(1, keepdim=True) + steps + deltas).expand(3, -1, -1)}


def time_prefill(model: nn.Module, inputs: Inputs) -> float:
    """Milliseconds that the decoder takes in one forward pass up to the next token's logits."""
    passed = _prefill(model, inputs)
    return passed.total_ms - passed.vision_ms


def cache_bytes(cache: DynamicCache) -> int:
    """Size in bytes of the keys and values that a cache holds."""
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(t.nbytes for layer in held for t in (layer.keys, layer.values))


def state_bytes(cache: DynamicCache) -> int:
    """Size in bytes of the recurrent and convolution states that a cache holds."""
    kept = (
        state
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for state in getattr(layer, name, {}).values()
    )
    return sum(state.nbytes for state in kept if state is not None)


def _base(model: Any) -> Any:
    return getattr(model, model.base_model_prefix)


@contextmanager
def timed_seam(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Time the patch's own work inside this context.

    A method that prunes before the decoder does it within the vision time: it merges tokens, and
    reads the tower's attention once more.

    Yields:
        a function that gives the milliseconds so far.
    """
    seam, device = require_patch(model).seam, next(model.parameters()).device
    inside = ("pass_of", "before_layer", "finish")
    merging = [name for name in ("_groups", "_merge_rows") if hasattr(seam.vision, name)]
    with (
        _timed(seam.decoder, inside, device) as spent,
        _timed(seam.vision, merging, device) as merged,
    ):
        yield lambda: spent() + merged()


@contextmanager
def _timed(owner: Any, names: Sequence[str], device: torch.device) -> Iterator[Callable[[], float]]:
    """Time every call of some methods of an object inside this context.

    Yields:
        a function that gives the milliseconds so far.
    """
    spans: list[tuple[Any, Any]] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = mark(device)
            try:
                return function(*args, **kwargs)
            finally:
                spans.append((start, mark(device)))

        return call

    before = {name: owner.__dict__.get(name) for name in names}
    for name in names:
        owner.__dict__[name] = timed(getattr(owner, name))
    try:
        yield lambda: sum(between_ms(start, end) for start, end in spans)
    finally:
        for name, function in before.items():
            del owner.__dict__[name]
            if function is not None:
                owner.__dict__[name] = function
