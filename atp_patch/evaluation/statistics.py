"""Means over tasks and their intervals, by resampling the images that all methods answered about.

Scores are (units, tasks) float64 arrays. A unit is an image; a score is NaN where a task asks
nothing about the image. Questions about one image are not independent, so images are drawn and not
questions. All methods share the same draws, so that differences and ratios are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval.

    Attributes:
        value: the number, NaN where it is undefined.
        low: lower end of the interval, NaN where there is none.
        high: upper end of the interval, NaN where there is none.
    """

    value: float
    low: float
    high: float

    def to_list(self) -> list[float | None]:
        """Return [value, low, high] for JSON, with None in place of NaN."""
        return [None if np.isnan(x) else float(x) for x in (self.value, self.low, self.high)]


def draw_weights(units: int, draws: int, seed: int) -> Array:
    """Return how often each unit occurs in each draw of ``units`` with replacement, (draws,
    units).
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)


def task_means(scores: Array, weights: Array) -> Array:
    """Return the weighted mean of each task, (draws, tasks); NaN where no question of it was
    drawn.
    """
    asked = ~np.isnan(scores)
    total = weights @ np.where(asked, scores, 0.0)
    count = weights @ asked.astype(np.float64)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def mean_accuracy(scores: Array, weights: Array) -> Estimate:
    """Return the mean over tasks of their mean scores."""
    return _estimate(*(task_means(scores, w).mean(1) for w in (_once(scores), weights)))


def retention(scores: Array, plain: Array, weights: Array) -> Estimate:
    """Return the mean over tasks of their mean score divided by that of the unpruned model on the
    same questions.
    """

    def ratio(w: Array) -> Array:
        ours, reference = task_means(scores, w), task_means(plain, w)
        shares = np.divide(
            ours, reference, out=np.full_like(ours, np.nan), where=np.nan_to_num(reference) > 0
        )
        return shares.mean(1)

    return _estimate(ratio(_once(scores)), ratio(weights))


def difference(scores: Array, other: Array, weights: Array) -> Estimate:
    """Return the difference of two mean accuracies, paired by question."""

    def gap(w: Array) -> Array:
        return (task_means(scores, w) - task_means(other, w)).mean(1)

    return _estimate(gap(_once(scores)), gap(weights))


def score_matrix(tasks: Sequence[dict[int, float]], units: Sequence[int]) -> Array:
    """Return each task's scores by unit as (units, tasks), with NaN where a task has no such
    unit.
    """
    matrix = np.full((len(units), len(tasks)), np.nan)
    row = {unit: at for at, unit in enumerate(units)}
    for column, scores in enumerate(tasks):
        for unit, score in scores.items():
            matrix[row[unit], column] = score
    return matrix


def _once(scores: Array) -> Array:
    """Return weights of the data as they are, with every unit once, (1, units)."""
    return np.ones((1, scores.shape[0]))


def _estimate(value: Array, draws: Array) -> Estimate:
    """Return the value with percentiles 2.5 and 97.5 of the draws in which it is defined."""
    defined = draws[~np.isnan(draws)]
    if np.isnan(value[0]) or not defined.size:
        return Estimate(float(value[0]), float("nan"), float("nan"))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(float(value[0]), float(low), float(high))
