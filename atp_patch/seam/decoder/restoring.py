"""Giving the decoder's output the length that the host's code and its caller expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from atp_patch.seam.decoder.streams import by_stream
from atp_patch.seam.decoder.visual_tokens import TokenState
from atp_patch.seam.host.cache import PrunedLayer, public_attention


def restored(
    output: Any,
    tokens: TokenState,
    num_layers: int,
    attending: Sequence[int],
    held: Callable[[int], PrunedLayer | None] | None,
) -> Any:
    """Return the decoder's output with zeros at pruned places, or None where it has its full length
    already.

    Args:
        output: what the decoder returned.
        tokens: the token state of the pass.
        num_layers: how many layers the decoder has.
        attending: the layers whose attention weights the output may hold.
        held: from a layer to the cache layer of its keys, where that holds a pruned prompt; None
            where the keys of the attention weights are the tokens of this pass alone.
    """
    length, last = tokens.visual.layout.length, num_layers - 1
    if tokens.entering(last) is None:
        return None

    def hidden(states: Tensor, layer: int) -> Tensor:
        survivors = tokens.entering(layer)
        if survivors is None:
            return states
        return by_stream(lambda stream: survivors.restore_hidden(stream, length), states)

    def attention(weights: Tensor, layer: int) -> Tensor:
        survivors, keys = tokens.entering(layer), None if held is None else held(layer)
        if survivors is not None:
            weights = survivors.restore_attention(weights, length, square=held is None)
        return weights if keys is None else public_attention(keys, weights)

    if isinstance(output, tuple):
        return (hidden(output[0], last), *output[1:])
    output.last_hidden_state = hidden(output.last_hidden_state, last)
    if output.hidden_states is not None:
        # hidden_states[i] is what layer i - 1 returned, and hidden_states[0] what enters layer 0.
        output.hidden_states = tuple(
            hidden(states, max(i - 1, 0)) for i, states in enumerate(output.hidden_states)
        )
    if output.attentions is not None:
        output.attentions = tuple(
            attention(weights, layer)
            for layer, weights in zip(attending, output.attentions, strict=True)
        )
    return output
