"""Leaving out decoder layers that add nothing, which is faster and changes no bit of the output.

The built-in model's decoder is as deep as those of the papers, but most of its layers end in
projections that are zero, so they add zero to the hidden states. A layer whose attention is scored
is not left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


def silent_layers(model: Any) -> tuple[int, ...]:
    """Return the numbers of the layers whose attention and MLP both end in a zero projection."""
    found = []
    for number, layer in enumerate(model.get_decoder().layers):
        ends = [_last_linear(getattr(layer, name, None)) for name in ("self_attn", "mlp")]
        if all(end is not None and not end.weight.any() and end.bias is None for end in ends):
            found.append(number)
    return tuple(found)


def _last_linear(module: nn.Module | None) -> nn.Linear | None:
    """Return the last projection of an attention (``o_proj``) or of an MLP (``down_proj``)."""
    for name in ("o_proj", "down_proj"):
        end = getattr(module, name, None)
        if isinstance(end, nn.Linear):
            return end
    return None


@contextmanager
def without(model: Any, silent: Iterable[int], scored: Iterable[int] = ()) -> Iterator[None]:
    """Leave out the model's silent layers, except those in ``scored``, inside the context."""
    layers = model.get_decoder().layers
    skipped = sorted(set(silent) - set(scored))
    for number in skipped:
        layers[number].forward = partial(_unchanged, number)
    try:
        yield
    finally:
        for number in skipped:
            del layers[number].forward


@contextmanager
def shallow(model: Any) -> Iterator[None]:
    """Remove the silent layers inside the context, for code that runs layers without a cache."""
    decoder, silent = model.get_decoder(), silent_layers(model)
    layers = decoder.layers
    decoder.layers = nn.ModuleList(x for k, x in enumerate(layers) if k not in silent)
    try:
        yield
    finally:
        decoder.layers = layers


def _unchanged(
    number: int,
    hidden_states: Tensor,
    *_: Any,
    past_key_values: Any = None,
    cache: Any = None,
    **__: Any,
) -> Tensor:
    cache = past_key_values if cache is None else cache  # its name until transformers 5.23
    if cache is not None:
        batch, tokens, _hidden = hidden_states.shape
        nothing = hidden_states.new_zeros(batch, 1, tokens, 1)
        cache.update(nothing, nothing, number)  # the cache still counts the tokens
    return hidden_states
