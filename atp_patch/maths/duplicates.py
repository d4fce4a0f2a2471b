"""Leaving out tokens that repeat others: pairs of two halves, and suppression within groups.

Shapes: ``G`` images, ``n`` tokens of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_patch.maths.indexing import top_k_mask


def without_duplicates(
    similarity: Tensor,
    turn: Tensor,
    valid: Tensor,
    counts: Sequence[int],
    steps: Sequence[int],
) -> Tensor:
    """Return the tokens that are left when those most similar to another go (VisPruner §3.3).

    In each step the tokens that are left form two halves, every second one in each. Each token of
    the first half looks for its largest similarity to a token of the second, and the tokens of the
    first half with the largest of these go.

    Args:
        similarity: (G, n, n), symmetric.
        turn: (G, n) int64, distinct numbers that say in which order the tokens alternate.
        valid: (G, n) bool.
        counts: for each image, how many tokens are left in the end, at most as many as are valid.
        steps: for each image, how many tokens go in one step, at least 1.

    Returns:
        (G, n) bool. Of tokens that are equally similar to another the later in ``turn`` goes first.
    """
    order = turn.argsort(dim=1)
    rows = order[..., None].expand_as(similarity)
    similarity = similarity.gather(1, rows).gather(2, rows.transpose(1, 2))
    left = valid.gather(1, order)
    sizes = left.sum(1).tolist()
    while sizes != list(counts):
        going = [
            min(step, size - count, (size + 1) // 2)
            for step, size, count in zip(steps, sizes, counts, strict=True)
        ]
        second = left & (left.cumsum(1) % 2 == 0)
        nearest = similarity.masked_fill(~second[:, None], -torch.inf).amax(2)
        number = torch.tensor(going, device=left.device)
        gone = top_k_mask(nearest.flip(1), (left & ~second).flip(1), number).flip(1)
        left = left & ~gone
        sizes = [size - number for size, number in zip(sizes, going, strict=True)]
    return torch.zeros_like(valid).scatter(1, order, left)


def suppress(
    similarity: Tensor, rank: Tensor, group: Tensor, valid: Tensor, threshold: Tensor
) -> Tensor:
    """Greedy non-maximum suppression within groups of tokens (PruneSID §3.3).

    From the best rank on, each token stays unless a better one of its group that stays is more
    similar to it than the threshold. All tokens are decided at once, again and again, until nothing
    changes: a token is settled when all better ones are, so that this is the greedy result.

    Args:
        similarity: (G, n, n), symmetric.
        rank: (G, n) int64, distinct, 0 for the best.
        group: (G, n) int64.
        valid: (G, n) bool.
        threshold: (G,).

    Returns:
        (G, n) bool, True for the tokens that stay.
    """
    alike = (group[:, :, None] == group[:, None]) & (similarity > threshold[:, None, None])
    overruled = alike & (rank[:, None] < rank[:, :, None])
    stays = valid
    while True:
        now = valid & ~(overruled & stays[:, None]).any(2)
        if torch.equal(now, stays):
            return now
        stays = now
