"""Leaving out tokens that repeat others: pairs of two halves, and suppression within groups.

Shapes: ``G`` images, ``n`` tokens of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

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
    images = torch.arange(len(turn), device=turn.device)[:, None, None]
    # The tokens that are left stand first, and at least one empty place behind them.
    order = functional.pad(turn.masked_fill(~valid, turn.shape[1]).argsort(dim=1), (0, 1))
    sizes = valid.sum(1).tolist()
    while sizes != list(counts):
        order = order[:, : max(sizes) + 1]
        left = _first_places(order, sizes)
        going = [
            min(step, size - count, (size + 1) // 2)
            for step, size, count in zip(steps, sizes, counts, strict=True)
        ]
        first, second = order[:, ::2], order[:, 1::2]
        alike = similarity[images, first[..., None], second[:, None]]
        nearest = alike.masked_fill(~left[:, None, 1::2], -torch.inf).amax(2)
        number = torch.tensor(going, device=turn.device)
        gone = ~left
        gone[:, ::2] |= top_k_mask(nearest.flip(1), left[:, ::2].flip(1), number).flip(1)
        order = order.gather(1, gone.int().argsort(dim=1, stable=True))
        sizes = [size - number for size, number in zip(sizes, going, strict=True)]
    # What has gone is written behind the last token.
    kept = order.masked_fill(~_first_places(order, sizes), turn.shape[1])
    return functional.pad(torch.zeros_like(valid), (0, 1)).scatter(1, kept, True)[:, :-1]


def _first_places(order: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return (G, n) bool: the first ``sizes`` places of each row of ``order``."""
    place = torch.arange(order.shape[1], device=order.device)
    return place < torch.tensor(sizes, device=order.device)[:, None]


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
