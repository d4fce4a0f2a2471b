"""Choosing and merging tokens by what a vision tower says of them (LLaVA-PruMerge, VisionZip).

Shapes: ``G`` groups (images, tiles or frames), ``n`` tokens of the largest group, ``m`` tokens kept
of the group that keeps most, ``d`` size of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from atp_patch.maths.indexing import gather_tokens, pack, top_k_mask


def outliers(scores: Tensor, valid: Tensor, minimum: int = 1) -> Tensor:
    """Return tokens above the upper fence ``Q3 + 1.5 * (Q3 - Q1)`` of their group (PruMerge §3.2).

    Args:
        scores, valid: (G, n) scores, and bool. Quartiles interpolate linearly between the two
            nearest scores.
        minimum: how many tokens of each group are taken at least. Where fewer lie above the fence
            (none does where all scores are equal), the best ones are taken, the earlier of equal
            ones first.

    Returns:
        (G, n) bool.
    """
    count = valid.sum(1, keepdim=True)
    ordered = scores.float().masked_fill(~valid, torch.inf).sort(dim=1).values

    def quantile(share: float) -> Tensor:
        place = share * (count - 1).clamp(min=0).float()
        low = place.floor().long()
        high = torch.minimum(low + 1, (count - 1).clamp(min=0))
        left, right = ordered.gather(1, low), ordered.gather(1, high)
        return left + (right - left) * (place - low)

    first, third = quantile(0.25), quantile(0.75)
    above = valid & (scores.float() > third + 1.5 * (third - first))
    taken = torch.full_like(count[:, 0], minimum)
    return above | top_k_mask(scores.float(), valid, taken)


def spread_supplement(keep: Tensor, turn: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """Return further tokens, sampled evenly in space (PruMerge+ §3.4, algorithm 1 lines 6 to 8).

    Args:
        keep: (G, n) bool, the tokens that are chosen already.
        turn: (G, n) int64, the turn of each token in an order that covers its grid evenly
            throughout (:func:`atp_patch.maths.progressive_order`).
        valid: (G, n) bool.
        counts: (G,) int64, how many tokens to add.

    Returns:
        (G, n) bool, the chosen tokens and ``counts`` others, or all others where there are fewer.
    """
    return keep | top_k_mask(-turn.float(), valid & ~keep, counts)


def merge_weights(
    attention: Tensor, key: Tensor, valid: Tensor, keep: Tensor, neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights that make each kept token (PruMerge §3.3, eq. 4; algorithm 1, lines 9-13).

    A kept token takes in those ``neighbours`` of the dropped tokens that are most similar to it by
    the inner product of keys. All of them, itself included, are weighed by the attention that they
    get, and the weights of one kept token sum to 1. (As printed the sum is not normalised, which
    would shrink the feature by orders of magnitude.)

    Args:
        attention: (G, n) float, not negative.
        key: (G, n, d).
        valid, keep: (G, n) bool.
        neighbours: how many dropped tokens each kept one takes in.

    Returns:
        index (G, m) int64, the kept tokens in order; weight (G, m, n) float32; and changed (G, m)
        bool, the kept tokens that took in another. Unused slots have weight 0.
    """
    index, used = pack(keep)
    similarity = gather_tokens(key.float(), index) @ key.float().transpose(1, 2)
    goes = (valid & ~keep)[:, None].expand_as(similarity)
    similarity = similarity.masked_fill(~goes, -torch.inf)
    nearest = similarity.topk(min(neighbours, key.shape[1]), dim=2).indices
    paid = attention.float()[:, None].expand_as(similarity).gather(2, nearest)
    paid = paid.masked_fill(~goes.gather(2, nearest), 0.0)
    own = attention.float().gather(1, index)
    total = own + paid.sum(2)
    counted = total > 0
    total = torch.where(counted, total, 1.0)[..., None]
    weight = torch.zeros_like(similarity).scatter(2, nearest, paid / total)
    # Where none of them gets any attention, the token stays what it is.
    own = torch.where(counted, own / total[..., 0], 1.0)
    weight = weight.scatter(2, index[..., None], own[..., None])
    return index, weight.masked_fill(~used[..., None], 0.0), used & (paid.sum(2) > 0)


def even_targets(valid: Tensor, counts: Tensor) -> Tensor:
    """Return every r-th of the valid tokens, in sequence, from the first (VisionZip §3.2).

    Args:
        valid: (G, n) bool.
        counts: (G,) int64, how many are taken, at most as many as are valid; r is the number of
            valid tokens divided by it, rounded down.

    Returns:
        (G, n) bool.
    """
    number = valid.cumsum(1) - 1
    step = (valid.sum(1) // counts.clamp(min=1)).clamp(min=1)[:, None]
    return valid & (number % step == 0) & (number // step < counts[:, None])


def nearest_target(key: Tensor, target: Tensor, member: Tensor) -> Tensor:
    """Return, as (G, n) int64, the target whose key has the largest cosine with each member's.

    A target is nearest to itself. Of equally near ones the first is taken. The number is -1 for
    tokens that are no members, and where there is no target.

    Args:
        key: (G, n, d).
        target, member: (G, n) bool; all targets are members.
    """
    index, used = pack(target)
    if index.shape[1] == 0:
        return torch.full_like(target, -1, dtype=torch.long)
    unit = normalize(key.float(), dim=-1)
    likeness = unit @ gather_tokens(unit, index).transpose(1, 2)
    # Equal keys stay equally near, however their products are rounded.
    likeness = likeness.mul_(2.0**20).round_().masked_fill_(~used[:, None], -torch.inf)
    nearest = index.gather(1, likeness.argmax(2))
    nearest = torch.where(target, torch.arange(target.shape[1], device=target.device), nearest)
    return torch.where(member & used.any(1, keepdim=True), nearest, -1)


def even_counts(
    total: int, sizes: list[int], minimum: int = 1, weights: Sequence[float] | None = None
) -> list[int]:
    """Divide ``total`` in proportion to ``sizes``, into whole numbers that sum to it if they can.

    Each share is at least ``minimum`` (or the size, if that is less) and at most the size. The
    largest remainders are rounded up first. With ``weights`` the shares are in proportion to these.
    """
    weights = sizes if weights is None else weights
    everything = sum(weights) or 1
    exact = [total * weight / everything for weight in weights]
    minimums = [min(minimum, size) for size in sizes]
    shares = [
        min(max(int(part), low), size)
        for part, low, size in zip(exact, minimums, sizes, strict=True)
    ]
    by_remainder = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    while sum(shares) < min(total, sum(sizes)):
        for i in by_remainder:
            if shares[i] < sizes[i] and sum(shares) < total:
                shares[i] += 1
    while sum(shares) > max(total, sum(minimums)):
        for i in reversed(by_remainder):
            if shares[i] > minimums[i] and sum(shares) > total:
                shares[i] -= 1
    return shares


def shrunk_grid(
    height: int, width: int, count: int, minimum: int = 1, *, square: bool = False
) -> tuple[int, int]:
    """Return (rows, columns) of the grid of about ``count`` tokens that a larger grid is shrunk to.

    Its proportions are as near to those of the larger grid as whole numbers allow.

    Args:
        height, width: the larger grid's rows and columns.
        count: how many tokens are wanted.
        minimum: how many tokens it has at least, where the larger grid has as many.
        square: keep both sides equal.
    """
    scale = (min(count, height * width) / (height * width)) ** 0.5
    rows = min(max(round(height * scale), 1), height)
    columns = rows if square else min(max(round(count / rows), 1), width)
    while rows * columns < min(minimum, height * width):
        if square:
            rows, columns = rows + 1, columns + 1
        elif columns < width and columns * height <= rows * width:
            columns += 1
        else:
            rows = rows + 1
    return rows, columns
