"""Greedy selections of a subset: the most different tokens, or those that cover the others.

Each is the greedy algorithm of its paper, one step for each token that is taken, run for all
samples at once. Shapes: ``G`` samples (or images), ``n`` tokens of the largest, ``m`` tokens taken
of the one that takes most, ``D`` size of the features. With the matrix of similarities given, time
is ``O(n m)`` for max-min, ``O(n^2 m)`` in blocked matrix products for the determinantal selection,
and for coverage ``O(n^2 log m)`` in practice on a CPU, ``O(n^2 m)`` elsewhere. Each holds a few
tables of ``n x n`` for each sample.

Of tokens that are equally good the one of the lowest index is taken. A greedy order does not depend
on how many tokens are taken, so that samples with different counts share their steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize, threshold

# Products are rounded in ways that depend on the shape of a batch, by about 1e-7.
_GRID = 2.0**20  # cosines are multiples of 1 / _GRID, so that equal tokens stay equal
_SPANNED = 1e-5  # a token with less than this share of itself left lies within what was taken
_BLOCK = 64  # determinantal steps between two updates of the whole matrix
_EVALUATED = 16  # gains of coverage that are computed at a time, so that they stay in the cache
_ALL_COMPUTED = 256  # of so few tokens, all gains are computed in each step on a CPU too


def cosine_similarities(features: Tensor, valid: Tensor, *, rounded: bool = True) -> Tensor:
    """Return the cosine of each pair of tokens, (G, n, n) float32; 0 for padding and norm 0.

    Args:
        features, valid: (G, n, D), and (G, n) bool.
        rounded: round the cosines to multiples of 2**-20, so that tokens that are equal have the
            similarity 1 and the same similarities to others, however their products were rounded.
    """
    unit = normalize(features.float(), dim=-1).masked_fill(~valid[..., None], 0.0)
    similarity = unit @ unit.transpose(1, 2)
    return similarity.mul_(_GRID).round_().div_(_GRID) if rounded else similarity


def max_min_selection(similarity: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """Return the tokens that are farthest from each other (DivPrune, Alvar et al., 2025, alg. 1).

    The distance is ``1 - similarity``. The first token is the one whose nearest neighbour is
    farthest away. Each further one is the token whose distance to the nearest of those that are
    taken is largest.

    Args:
        similarity: (G, n, n), symmetric.
        valid: (G, n) bool.
        counts: (G,) int64; all valid tokens are taken where it is larger than their number.

    Returns:
        (G, n) bool with exactly ``min(counts, valid tokens)`` True entries in each row.
    """
    steps, rows = _steps(counts, valid), _Rows(similarity)
    if steps == 0:
        return torch.zeros_like(valid)
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    nearest = similarity.masked_fill(itself | ~valid[:, None], -torch.inf).amax(2)
    pick = nearest.masked_fill(~valid, torch.inf).argmin(1)
    taken = [pick]
    closeness = torch.full_like(nearest, -torch.inf).masked_fill(~valid, torch.inf)
    for _ in range(steps - 1):
        torch.maximum(closeness, rows.of(pick), out=closeness)
        closeness.scatter_(1, pick[:, None], torch.inf)
        pick = closeness.argmin(1)
        taken.append(pick)
    return _mask(taken, valid, counts)


def determinantal_selection(
    similarity: Tensor, quality: Tensor, valid: Tensor, counts: Tensor
) -> Tensor:
    """Return the most probable subset of a determinantal point process, found greedily.

    The kernel is ``diag(quality) similarity diag(quality)`` (CDPruner, Zhang et al., 2025),
    and each step takes the token that makes the determinant of the taken ones largest, by the
    Cholesky update of Chen et al. (2018, algorithm 1). What is left of token ``i`` is
    ``quality_i^2 d_i``, where ``d_i`` is the part of its feature that the taken ones do not span;
    it is computed without the qualities. A token of which at most 1e-5 is left counts as spanned.
    The spanned ones, and those of quality 0, are equally good and come last.

    Args:
        similarity: (G, n, n), symmetric and positive semidefinite, with 1 on the diagonal, or 0 for
            a token that is never worth taking. It is best not rounded: what is left of a token is a
            small difference of large numbers.
        quality: (G, n), not negative.
        valid: (G, n) bool.
        counts: (G,) int64; all valid tokens are taken where it is larger than their number.

    Returns:
        (G, n) bool with exactly ``min(counts, valid tokens)`` True entries in each row.
    """
    steps = _steps(counts, valid)
    rest = similarity.float().clone()  # minus what the taken tokens explain, block by block
    rows = _Rows(rest)
    squared = quality.float().square()
    left = rest.diagonal(dim1=1, dim2=2).round()
    gone = torch.zeros_like(left).masked_fill(~valid, -torch.inf)
    block = rest.new_empty(rest.shape[0], min(_BLOCK, steps), rest.shape[1])
    taken: list[Tensor] = []
    for step in range(steps):
        at = step % _BLOCK
        if at == 0 and step > 0:
            rest.baddbmm_(block.transpose(1, 2), block, alpha=-1)
        pick = torch.addcmul(gone, threshold(left, _SPANNED, 0.0), squared).argmax(1)
        column = pick[:, None]
        explained = rows.of(pick)
        if at:
            own = block[:, :at].gather(2, column[:, None].expand(-1, at, 1)).transpose(1, 2)
            explained = torch.baddbmm(explained[:, None], own, block[:, :at], alpha=-1)[:, 0]
        # What is spanned explains nothing further: 1 / sqrt(infinity) is 0.
        scale = threshold(left.gather(1, column), _SPANNED, torch.inf).rsqrt_()
        explained = torch.mul(explained, scale, out=block[:, at])
        left.addcmul_(explained, explained, value=-1)
        gone.scatter_(1, column, -torch.inf)
        taken.append(pick)
    return _mask(taken, valid, counts)


def coverage_selection(similarity: Tensor, weight: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """Return the tokens that cover the others best (SCOPE, Deng et al., 2025).

    The coverage of a set is the sum, over all tokens, of the similarity to the nearest member, or 0
    where that is negative. Each step takes the token with the largest gain of coverage, times its
    weight.

    A gain never grows while tokens are taken. So the last gain that was computed of a token bounds
    its present one from above, and on a CPU, where there are many tokens, only the gains of tokens
    with large bounds are computed anew, until the largest of all is a present one. Elsewhere all
    gains are computed in every step, in few operations and without waiting for the device.

    Args:
        similarity: (G, n, n), symmetric.
        weight: (G, n), not negative.
        valid: (G, n) bool.
        counts: (G,) int64; all valid tokens are taken where it is larger than their number.

    Returns:
        (G, n) bool with exactly ``min(counts, valid tokens)`` True entries in each row.
    """
    rows, size = _Rows(similarity), valid.shape[1]
    bounded = similarity.device.type == "cpu" and size > _ALL_COMPUTED
    bound = torch.full_like(weight, torch.inf, dtype=torch.float32)
    bound = bound.masked_fill(~valid, -torch.inf)
    covered = torch.zeros_like(bound).masked_fill(~valid, torch.inf)  # padding gains nothing
    taken: list[Tensor] = []
    for step in range(_steps(counts, valid)):
        if bounded:
            pick = _largest_gain(rows, covered, weight, bound, size // (step + 1))
        else:
            gain = (similarity - covered[:, None]).clamp_(min=0).sum(2).mul_(weight)
            pick = torch.minimum(bound, gain, out=bound).argmax(1)
        covered = torch.maximum(covered, rows.of(pick))
        bound.scatter_(1, pick[:, None], -torch.inf)
        taken.append(pick)
    return _mask(taken, valid, counts)


def _largest_gain(
    rows: _Rows, covered: Tensor, weight: Tensor, bound: Tensor, width: int
) -> Tensor:
    """Return, as (G,) int64, the token with the largest gain, computing few of them.

    Args:
        rows: the similarities.
        covered: (G, n), how well each token is covered already.
        weight: (G, n).
        bound: (G, n), a bound of each gain from above, which is lowered in place.
        width: how many gains to compute at first.
    """
    size = bound.shape[1]
    width = min(max(_EVALUATED, width), size)
    present = bound <= 0  # it cannot fall further
    while True:
        pick = bound.argmax(1)
        if bool(present.gather(1, pick[:, None]).all()):
            return pick
        index = bound.masked_fill(present, -torch.inf).topk(width, dim=1).indices
        gain = torch.cat([rows.gain(part, covered) for part in index.split(_EVALUATED, 1)], 1)
        gain = gain * weight.gather(1, index)
        bound.scatter_(1, index, torch.minimum(gain, bound.gather(1, index)))
        present.scatter_(1, index, True)
        width = min(2 * width, size)


class _Rows:
    """The rows of each sample's matrix of similarities, which is read and never copied."""

    def __init__(self, matrix: Tensor) -> None:
        """Look at a matrix (G, n, n)."""
        self.flat = matrix.flatten(0, 1)
        number, size = matrix.shape[:2]
        self.first = size * torch.arange(number, device=matrix.device) if number > 1 else None

    def of(self, pick: Tensor) -> Tensor:
        """Return (G, n): one row of each sample, for indices (G,)."""
        return self.flat.index_select(0, pick if self.first is None else pick + self.first)

    def gain(self, index: Tensor, covered: Tensor) -> Tensor:
        """Return (G, w): how much more than ``covered`` (G, n) the tokens of ``index`` (G, w)
        cover.
        """
        place = index if self.first is None else index + self.first[:, None]
        rows = self.flat.index_select(0, place.flatten())
        return (rows.unflatten(0, index.shape) - covered[:, None]).clamp_(min=0).sum(2)


def _steps(counts: Tensor, valid: Tensor) -> int:
    """Return how many steps the sample needs that takes most."""
    return int(torch.minimum(counts, valid.sum(1)).max()) if valid.numel() else 0


def _mask(taken: Iterable[Tensor], valid: Tensor, counts: Tensor) -> Tensor:
    """Return, as (G, n) bool, the first ``counts`` tokens that were taken; a step's are (G,)."""
    steps = list(taken)
    if not steps:
        return torch.zeros_like(valid)
    order = torch.stack(steps, 1)
    early = torch.arange(len(steps), device=valid.device) < counts[:, None]
    # A sample without valid tokens left takes others again, which changes nothing.
    return torch.zeros_like(valid).scatter_reduce(1, order, early, "amax") & valid
