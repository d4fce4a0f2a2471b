"""Rows of paired parameters hold every pair, and far fewer rows than the product."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.helpers.pairing import paired


@pytest.mark.parametrize("sizes", [(2, 2), (5, 2, 2, 2), (12, 2, 3, 2), (3, 3, 3, 3)])
def test_every_two_values_meet(sizes: tuple[int, ...]) -> None:
    names = zip("abcd", sizes, strict=False)
    values = [[f"{name}{number}" for number in range(size)] for name, size in names]
    rows = paired(*values)
    for (i, some), (j, others) in combinations(enumerate(values), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(some, others))
    first, second = sorted(sizes)[-2:]
    assert len(set(rows)) == len(rows) <= 1.5 * first * second
    assert rows == paired(*values)
