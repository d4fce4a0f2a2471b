"""Ragged keep-index algebra: which tokens are left, where they came from, where they go back to.

``B`` batch, ``L`` sequence, ``n`` kept tokens of the longest sample. Samples that keep fewer are
padded at the end; ``valid`` is False there, and nothing in those slots ever writes or counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(keep: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the True entries of each row, in order, packed to the left.

    Args:
        keep: (B, L) bool.
        length: slots of the result; None counts the longest row, which waits for the device.

    Returns:
        index (B, n) int64, 0 in unused slots, and valid (B, n) bool.
    """
    counts = keep.sum(1)
    if length is None:
        length = int(counts.max()) if keep.numel() else 0
    slot = keep.cumsum(1) - 1
    # Entries that are not kept, or do not fit, write to a spare last slot.
    target = torch.where(keep & (slot < length), slot, length)
    places = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)
    index = torch.zeros(keep.shape[0], length + 1, dtype=torch.long, device=keep.device)
    index = index.scatter(1, target, places)[:, :length]
    valid = torch.arange(length, device=keep.device) < counts[:, None]
    return torch.where(valid, index, 0), valid


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a sequence: (B or 1, L, *) and (B, n) -> (B, n, *)."""
    # Whole rows are copied at once, which `gather` does number by number.
    if x.shape[0] > 1:
        index = index + x.shape[1] * torch.arange(x.shape[0], device=index.device)[:, None]
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def gather_heads(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each head's sequence: (B, H, L, d) and (B, n) -> (B, H, n, d)."""
    rows = x.transpose(1, 2)
    if rows.is_contiguous():  # as queries and keys are before they are cached
        return gather_tokens(rows, index).transpose(1, 2)
    heads = x.shape[1]
    each = index.repeat_interleave(heads, 0)
    return gather_tokens(x.flatten(0, 1), each).unflatten(0, (-1, heads))


def scatter_tokens(
    x: Tensor, index: Tensor, valid: Tensor, length: int, fill: float = 0.0
) -> Tensor:
    """Put rows back: (B, n, *) -> (B, length, *), ``fill`` where nothing was kept.

    Inverse of :func:`gather_tokens`; rows of invalid slots are dropped.
    """
    batch, n = index.shape
    rest = x.shape[2:]
    target = torch.where(valid, index, length).reshape(batch, n, *(1 for _ in rest))
    out = x.new_full((batch, length + 1, *rest), fill)
    return out.scatter(1, target.expand(batch, n, *rest), x)[:, :length]


def local_index(index: Tensor, valid: Tensor, length: int) -> Tensor:
    """Inverse map of :func:`pack`: (B, length) int64, the slot of each position, -1 if not kept."""
    slots = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    return scatter_tokens(slots, index, valid, length, fill=-1)


def top_k_mask(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """The best ``counts[b]`` valid tokens of each sample.

    Args:
        scores: (B, V); on ties the earlier token is taken.
        valid: (B, V) bool.
        counts: (B,) int64; more than there are valid tokens means all of them.

    Returns:
        (B, V) bool with exactly ``min(counts, valid tokens)`` True entries a row.
    """
    return (descending_rank(scores, valid) < counts[:, None]) & valid


def descending_rank(scores: Tensor, valid: Tensor) -> Tensor:
    """(B, V) int64 place of each token from the best (0); ties by position, invalid tokens last."""
    # Two stable sorts: by score, then valid before invalid (a valid score may itself be -inf).
    finite = scores.masked_fill(~valid, -torch.inf)
    by_score = finite.argsort(dim=1, descending=True, stable=True)
    last = (~valid).gather(1, by_score).to(torch.int8).argsort(dim=1, stable=True)
    order = by_score.gather(1, last)
    places = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return torch.empty_like(order).scatter(1, order, places)
