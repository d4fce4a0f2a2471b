"""Greedy selections stated plainly, one sample and one token at a time, in float64.

Nothing here knows how the package does it: spans are found by least squares, coverage is summed
anew in every step. Of equal tokens the first is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

_EQUAL = 1e-6  # differences below this are rounding
Values = Callable[[list[int]], np.ndarray]  # from the tokens taken so far to every token's value


def units(features: ArrayLike) -> np.ndarray:
    """Features of length 1; those of zeros stay zeros."""
    x = np.asarray(features, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)


def greedily(size: int, count: int, values: Values, rounding: float = _EQUAL) -> list[int]:
    """Tokens in the order in which a greedy selection takes them.

    Args:
        rounding: differences up to this, or this share of the value, are rounding.
    """
    taken: list[int] = []
    while len(taken) < min(count, size):
        now = values(taken)
        left = [i for i in range(size) if i not in taken]
        best = max(now[i] for i in left)
        taken.append(next(i for i in left if now[i] >= best - max(rounding, _EQUAL * abs(best))))
    return taken


def max_min(features: ArrayLike, count: int) -> list[int]:
    """Farthest nearest neighbour first, then the farthest from those that are taken."""
    distance = 1 - units(features) @ units(features).T

    def nearest(taken: list[int]) -> np.ndarray:
        if taken:
            return distance[:, taken].min(1)
        others = [[d for j, d in enumerate(row) if j != i] for i, row in enumerate(distance)]
        return np.array([min(row, default=0.0) for row in others])

    return greedily(len(distance), count, nearest)


def determinantal(features: ArrayLike, quality: ArrayLike, count: int) -> list[int]:
    """Largest quality squared, times the squared distance to the span of the taken features."""
    x, q = units(features), np.asarray(quality, dtype=np.float64)

    def value(taken: list[int]) -> np.ndarray:
        rest = x.T
        if taken:
            basis = x[taken].T
            rest = rest - basis @ np.linalg.lstsq(basis, rest, rcond=1e-4)[0]
        left = (rest**2).sum(0)
        return q**2 * np.where(left > 1e-5, left, 0.0)

    return greedily(len(x), count, value, rounding=0)


def coverage(features: ArrayLike, weight: ArrayLike, count: int) -> list[int]:
    """Largest gain of the summed similarities to the nearest taken token, times the weight."""
    alike, w = units(features) @ units(features).T, np.asarray(weight, dtype=np.float64)

    def gain(taken: list[int]) -> np.ndarray:
        covered = np.maximum(alike[:, taken].max(1, initial=0.0), 0.0)
        with_each = np.maximum(alike, covered[:, None]).sum(0)
        return w * (with_each - covered.sum())

    return greedily(len(alike), count, gain)


def highest(score: ArrayLike, count: int) -> list[int]:
    """The tokens with the highest scores, of equal ones the first."""
    return np.argsort(-np.asarray(score), kind="stable")[:count].tolist()


def joins(others: list[int], key: ArrayLike, count: int) -> dict[int, list[int]]:
    """VisionZip's contextual tokens: target -> itself and the others that are most like it."""
    if not count:
        return {}
    unit = units(key)
    targets = others[:: len(others) // count][:count]
    made = {target: [target] for target in targets}
    for i in others:
        if i not in targets:
            alike = [float(unit[i] @ unit[target]) for target in targets]
            made[targets[next(j for j, a in enumerate(alike) if a >= max(alike) - _EQUAL)]].append(
                i
            )
    return made


def zipped(attention: ArrayLike, key: ArrayLike, count: int) -> dict[int, list[int]]:
    """VisionZip: kept token -> the tokens whose mean it becomes."""
    dominant = highest(attention, round(27 / 32 * count))
    others = [i for i in range(len(np.asarray(attention))) if i not in dominant]
    return {i: [i] for i in dominant} | joins(others, key, count - len(dominant))
