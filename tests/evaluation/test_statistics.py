"""Means, ratios, differences and intervals against loops over lists."""

from __future__ import annotations

import math

import numpy as np
import pytest

from atp_patch.evaluation.statistics import (
    Array,
    difference,
    draw_weights,
    mean_accuracy,
    retention,
    score_matrix,
    task_means,
)

UNITS, TASKS, DRAWS = 23, 3, 200


def scores(seed: int, chance: float = 0.6) -> Array:
    """Right and wrong answers; the same questions are missing whatever the seed."""
    missing = np.random.default_rng(99).random((UNITS, TASKS)) < 0.3
    values = (np.random.default_rng(seed).random((UNITS, TASKS)) < chance).astype(float)
    values[missing] = np.nan
    return values


def naive_means(values: Array, units: list[int]) -> list[float]:
    """Mean of each task over a list of units, with repetitions."""
    means = []
    for task in range(TASKS):
        asked = [values[u, task] for u in units if not math.isnan(values[u, task])]
        means.append(sum(asked) / len(asked) if asked else math.nan)
    return means


def drawn(weights: Array) -> list[list[int]]:
    """The lists of units behind the weights."""
    return [[u for u in range(UNITS) for _ in range(int(row[u]))] for row in weights]


def quantile(values: list[float], share: float) -> float:
    """By hand: linear between the two nearest of the sorted values."""
    ordered = sorted(v for v in values if not math.isnan(v))
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_every_draw_has_as_many_units_and_its_seed_decides() -> None:
    weights = draw_weights(UNITS, DRAWS, 4)
    assert weights.shape == (DRAWS, UNITS)
    assert (weights.sum(1) == UNITS).all()
    assert (weights == draw_weights(UNITS, DRAWS, 4)).all()
    assert (weights != draw_weights(UNITS, DRAWS, 5)).any()
    # Drawn with replacement: a unit is left out of a draw with probability (1 - 1/n)^n.
    assert abs((weights == 0).mean() - (1 - 1 / UNITS) ** UNITS) < 0.02


def test_means_of_tasks() -> None:
    values, weights = scores(1), draw_weights(UNITS, DRAWS, 0)
    expected = [naive_means(values, units) for units in drawn(weights)]
    np.testing.assert_allclose(task_means(values, weights), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["mean", "retention", "difference"])
def test_estimates_against_loops(kind: str) -> None:
    ours, other = scores(1), scores(2, 0.8)
    weights = draw_weights(UNITS, DRAWS, 0)

    def naive(units: list[int]) -> float:
        a, b = naive_means(ours, units), naive_means(other, units)
        if kind == "mean":
            return sum(a) / TASKS
        if kind == "difference":
            return sum(a) / TASKS - sum(b) / TASKS
        return sum(x / y if y > 0 else math.nan for x, y in zip(a, b, strict=True)) / TASKS

    found = {
        "mean": lambda: mean_accuracy(ours, weights),
        "retention": lambda: retention(ours, other, weights),
        "difference": lambda: difference(ours, other, weights),
    }[kind]()
    values = [naive(units) for units in drawn(weights)]
    assert found.value == pytest.approx(naive(list(range(UNITS))))
    assert found.low == pytest.approx(quantile(values, 0.025))
    assert found.high == pytest.approx(quantile(values, 0.975))


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    """Two methods that differ on one question differ by little, however hard the questions are."""
    ours = scores(1)
    other = ours.copy()
    row = int(np.flatnonzero(ours[:, 0] == 1)[0])
    other[row, 0] = 0
    weights = draw_weights(UNITS, 2000, 0)
    gap, alone = difference(ours, other, weights), mean_accuracy(ours, weights)
    assert gap.low >= 0
    assert gap.high - gap.low < (alone.high - alone.low) / 2
    same = difference(ours, ours, weights)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_retention_of_the_unpruned_model_is_one() -> None:
    weights = draw_weights(UNITS, DRAWS, 0)
    found = retention(scores(1), scores(1), weights)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


def test_retention_is_undefined_where_the_unpruned_model_knows_nothing() -> None:
    plain = scores(1)
    plain[:, 1] = np.where(np.isnan(plain[:, 1]), np.nan, 0)
    found = retention(scores(2), plain, draw_weights(UNITS, DRAWS, 0))
    assert found.to_list() == [None, None, None]


def test_draws_without_a_question_of_a_task_do_not_count() -> None:
    values = np.array([[1.0, 1.0], [0.0, np.nan], [1.0, np.nan]])
    weights = np.array([[1.0, 1, 1], [0, 2, 1], [3, 0, 0]])
    assert np.isnan(task_means(values, weights)[1, 1])
    found = mean_accuracy(values, weights)
    assert found.value == pytest.approx((2 / 3 + 1) / 2)
    assert (found.low, found.high) == pytest.approx(
        tuple(np.percentile([(2 / 3 + 1) / 2, 1.0], [2.5, 97.5]))
    )


def test_scores_go_to_their_places() -> None:
    matrix = score_matrix([{4: 1.0, 9: 0.0}, {9: 0.5}], [4, 7, 9])
    expected = [[1.0, np.nan], [np.nan, np.nan], [0.0, 0.5]]
    np.testing.assert_array_equal(matrix, expected)


def test_intervals_cover_the_truth() -> None:
    """Of many samples of a known chance, about 95 in 100 intervals hold it."""
    rng = np.random.default_rng(0)
    weights = draw_weights(120, 400, 0)
    held = 0
    for _ in range(200):
        values = (rng.random((120, 2)) < (0.7, 0.4)).astype(float)
        found = mean_accuracy(values, weights)
        held += found.low <= 0.55 <= found.high
    assert 0.9 <= held / 200 <= 0.99
