"""Greedy selections stated plainly, one sample and one token at a time, in float64.

Nothing here knows how the package does it: spans are found by least squares, coverage is summed
anew in every step. Of equal tokens the first is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

_EQUAL = 1e-6  # differences below this are rounding


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of two features, 0 where one of them is 0."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0


def cosines(features: ArrayLike) -> list[list[float]]:
    """The cosine of each pair of features."""
    x = np.asarray(features, dtype=np.float64)
    return [[cosine(a, b) for b in x] for a in x]


def first_best(values: Sequence[float]) -> int:
    """The index of the first value that no other exceeds by more than rounding."""
    best = max(values)
    return next(i for i, value in enumerate(values) if value >= best - _EQUAL * max(abs(best), 1))


def greedily(size: int, count: int, value: Callable[[int, list[int]], float]) -> list[int]:
    """Tokens in the order in which a greedy selection takes them."""
    taken: list[int] = []
    while len(taken) < min(count, size):
        left = [i for i in range(size) if i not in taken]
        taken.append(left[first_best([value(i, taken) for i in left])])
    return taken


def max_min(features: ArrayLike, count: int) -> list[int]:
    """Farthest nearest neighbour first, then the farthest from those that are taken."""
    alike = cosines(features)

    def distance(i: int, taken: list[int]) -> float:
        others = taken or [j for j in range(len(alike)) if j != i]
        return min((1 - alike[i][j] for j in others), default=0.0)

    return greedily(len(alike), count, distance)


def determinantal(features: ArrayLike, quality: ArrayLike, count: int) -> list[int]:
    """Largest quality squared, times the squared distance to the span of the taken features."""
    x, q = np.asarray(features, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)

    def value(i: int, taken: list[int]) -> float:
        if taken:
            basis = x[taken].T
            rest = x[i] - basis @ np.linalg.lstsq(basis, x[i], rcond=1e-4)[0]
        else:
            rest = x[i]
        left = float(rest @ rest)
        return float(q[i] ** 2) * left if left > 1e-5 else 0.0

    return greedily(len(x), count, value)


def coverage(features: ArrayLike, weight: ArrayLike, count: int) -> list[int]:
    """Largest gain of the summed similarities to the nearest taken token, times the weight."""
    alike, w = cosines(features), np.asarray(weight, dtype=np.float64)

    def covered(taken: list[int]) -> float:
        return sum(max([0.0, *(one[i] for i in taken)]) for one in alike)

    return greedily(
        len(alike), count, lambda i, taken: w[i] * (covered([*taken, i]) - covered(taken))
    )
