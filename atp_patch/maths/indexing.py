"""Indices of kept tokens: packing them, gathering their rows, and putting the rows back.

Shapes: ``B`` batch, ``L`` sequence, ``n`` kept tokens of the longest sample. Samples that keep
fewer are padded at the end. ``valid`` is False there, and what stands in those slots is never
written back and never counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(keep: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the positions of the True entries of each row, in order, packed to the left.

    Args:
        keep: (B, L) bool.
        length: ``n`` of the result. None counts the entries of the longest row, which waits for
            the device.

    Returns:
        index (B, n) int64, 0 in unused slots, and valid (B, n) bool.
    """
    counts = keep.sum(1)
    if length is None:
        length = int(counts.max()) if keep.numel() else 0
    slot = keep.cumsum(1) - 1
    # Entries that are not kept, or do not fit, write to an extra last slot, which is cut off.
    target = torch.where(keep & (slot < length), slot, length)
    places = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)
    index = torch.zeros(keep.shape[0], length + 1, dtype=torch.long, device=keep.device)
    index = index.scatter(1, target, places)[:, :length]
    valid = torch.arange(length, device=keep.device) < counts[:, None]
    return torch.where(valid, index, 0), valid


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of a sequence: (B or 1, L, *) and index (B, n) -> (B, n, *)."""
    # This copies whole rows at once; `gather` would copy number by number.
    if x.shape[0] > 1:
        index = index + x.shape[1] * torch.arange(x.shape[0], device=index.device)[:, None]
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def gather_heads(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of each head's sequence: (B, H, L, d) and index (B, n) -> (B, H, n, d)."""
    rows = x.transpose(1, 2)
    if rows.is_contiguous():  # as queries and keys are before they are cached
        return gather_tokens(rows, index).transpose(1, 2)
    heads = x.shape[1]
    each = index.repeat_interleave(heads, 0)
    return gather_tokens(x.flatten(0, 1), each).unflatten(0, (-1, heads))


def scatter_tokens(
    x: Tensor, index: Tensor, valid: Tensor, length: int, fill: float = 0.0
) -> Tensor:
    """Put rows back into a sequence: (B, n, *) -> (B, length, *).

    This is the inverse of :func:`gather_tokens`. Places that were not kept hold ``fill``, and the
    rows of invalid slots are dropped.
    """
    batch, n = index.shape
    rest = x.shape[2:]
    target = torch.where(valid, index, length).reshape(batch, n, *(1 for _ in rest))
    out = x.new_full((batch, length + 1, *rest), fill)
    return out.scatter(1, target.expand(batch, n, *rest), x)[:, :length]


def local_index(index: Tensor, valid: Tensor, length: int) -> Tensor:
    """Return, as (B, length) int64, the slot of each position, or -1; it inverts :func:`pack`."""
    slots = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    return scatter_tokens(slots, index, valid, length, fill=-1)


def top_k_mask(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """Return the ``counts[b]`` valid tokens of each sample with the highest scores.

    Args:
        scores: (B, V); of equal scores the earlier token is taken.
        valid: (B, V) bool.
        counts: (B,) int64; all valid tokens are taken where it is larger than their number.

    Returns:
        (B, V) bool with exactly ``min(counts, valid tokens)`` True entries a row.
    """
    return (descending_rank(scores, valid) < counts[:, None]) & valid


def descending_rank(scores: Tensor, valid: Tensor) -> Tensor:
    """Return, as (B, V) int64, the rank of each token, 0 for the best.

    Equal scores are ranked by position, and invalid tokens come last.
    """
    # Two stable sorts: by score, then valid before invalid, since a valid score may be -inf itself.
    finite = scores.masked_fill(~valid, -torch.inf)
    by_score = finite.argsort(dim=1, descending=True, stable=True)
    last = (~valid).gather(1, by_score).to(torch.int8).argsort(dim=1, stable=True)
    order = by_score.gather(1, last)
    places = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return torch.empty_like(order).scatter(1, order, places)


def ranked(valid: Tensor, *keys: Tensor) -> Tensor:
    """Return, as (B, V) int64, the rank of each token, 0 for the best, by several keys.

    Args:
        valid: (B, V) bool; invalid tokens come last.
        keys: (B, V) each. A larger first key ranks before a smaller; where the first keys are equal
            the second one decides, and so on. Tokens that are equal in all are ranked by position.
    """
    places = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    order = places
    for key in (*reversed(keys), valid.to(torch.int8)):
        by_key = key.gather(1, order).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, by_key)
    return torch.empty_like(order).scatter(1, order, places)
