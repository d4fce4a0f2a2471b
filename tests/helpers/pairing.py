"""Rows of parameters in which every two values of two parameters meet, and not every combination.

A fault that needs one value shows in such rows, and one that needs two values too. Crossing all
values costs many times as much, and finds besides only what needs three at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairs(**values: Iterable[Any]) -> Any:
    """Parametrize a test by these values of its parameters, paired as :func:`paired` says."""
    rows = paired(*map(list, values.values()))
    return pytest.mark.parametrize(tuple(values), rows, ids=name_of)


def in_turn(values: Iterable[Any], settings: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Rows of each value with one setting, the settings in turn: where neither knows the other."""
    return [(value, settings[number % len(settings)]) for number, value in enumerate(values)]


def paired(*values: list[Any]) -> list[tuple[Any, ...]]:
    """Choose rows, one value of each list in a row, that hold every pair of values of two lists.

    The same lists give the same rows. Each row is the first of those with the most new pairs.
    """
    rows = product(*(range(len(one)) for one in values))
    every = [(row, set(combinations(enumerate(row), 2))) for row in rows]
    missing = set().union(*(found for _, found in every))
    chosen = []
    while missing:
        row, found = max(every, key=lambda one: len(one[1] & missing))
        chosen.append(row)
        missing -= found
    return [tuple(v[i] for v, i in zip(values, row, strict=True)) for row in sorted(chosen)]


def name_of(value: Any) -> str | None:
    """The name of a value that has one; pytest finds one for others."""
    return getattr(value, "name", None)
