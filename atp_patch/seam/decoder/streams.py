"""Hidden states of decoders that carry several streams of them side by side, as Gemma 3n does.

They are (S, B, L, D) there, and (B, L, D) everywhere else. A token goes from all streams at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_stream(change: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Return hidden states in which each stream (B, L, D) has been changed, or the same object if
    none is.

    Args:
        change: a function of the states of one stream.
        hidden: (B, L, D), or (S, B, L, D) with streams.
    """
    if hidden.ndim == 3:
        return change(hidden)
    streams = hidden.unbind()
    changed = [change(stream) for stream in streams]
    if all(new is old for new, old in zip(changed, streams, strict=True)):
        return hidden
    return torch.stack(changed)


def first_stream(hidden: Tensor) -> Tensor:
    """Return (B, L, D): the stream that the embeddings enter, which attention reads in Gemma 3n."""
    return hidden if hidden.ndim == 3 else hidden[0]
