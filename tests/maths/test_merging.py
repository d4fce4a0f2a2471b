"""Outliers, supplement, merging and counts against plain restatements; where they degenerate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_patch.maths import (
    even_counts,
    even_targets,
    merge_weights,
    nearest_target,
    outliers,
    progressive_order,
    shrunk_grid,
    spread_supplement,
)
from tests.helpers.merging import Group, chosen, fence, merged, sampled
from tests.helpers.selection import joins

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
fixed = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def drawn(sizes: list[tuple[int, int]], seed: int, spread: float) -> tuple[torch.Tensor, ...]:
    """Attention (softmaxed, sharp), keys and features of groups, padded with junk."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(h * w for h, w in sizes)
    logits = spread * torch.randn(len(sizes), longest, generator=generator)
    key = torch.randn(len(sizes), longest, 5, generator=generator)
    features = torch.randn(len(sizes), longest, 3, generator=generator)
    valid = torch.arange(longest) < torch.tensor([h * w for h, w in sizes])[:, None]
    attention = logits.masked_fill(~valid, -torch.inf).softmax(1)
    return attention.masked_fill(~valid, 9.0), key, features, valid


@fixed
@given(
    sizes=st.lists(GRIDS, min_size=1, max_size=4),
    seed=st.integers(0, 99),
    spread=st.floats(0.1, 4),
    neighbours=st.integers(0, 8),
)
def test_algorithm_1_group_by_group(
    sizes: list[tuple[int, int]], seed: int, spread: float, neighbours: int
) -> None:
    attention, key, features, valid = drawn(sizes, seed, spread)
    keep = outliers(attention, valid)
    index, weight, changed = merge_weights(attention, key, valid, keep, neighbours)
    made = weight @ features
    for g, (height, width) in enumerate(sizes):
        n = height * width
        places = [(i // width, i % width) for i in range(n)]
        group = Group(attention[g, :n].double().numpy(), key[g, :n].double().numpy(), places)
        kept = chosen(group, plus=False, count=None)
        assert keep[g].nonzero().flatten().tolist() == kept
        expected = merged(group, features[g, :n].double().numpy(), kept, neighbours)
        for slot, i in enumerate(kept):
            assert index[g, slot] == i
            np.testing.assert_allclose(made[g, slot].numpy(), expected[i], atol=1e-5)
            assert bool(changed[g, slot]) == (neighbours > 0 and len(kept) < n)
        assert not changed[g, len(kept) :].any()
        assert not weight[g, len(kept) :].any()


@fixed
@given(size=GRIDS, seed=st.integers(0, 99), count=st.integers(0, 40))
def test_the_supplement_is_the_even_walk_over_what_is_left(
    size: tuple[int, int], seed: int, count: int
) -> None:
    attention, key, _, valid = drawn([size], seed, 2.0)
    keep = outliers(attention, valid)
    turn = progressive_order(*size)[None]
    got = spread_supplement(keep, turn, valid, torch.tensor([count]))
    places = [(i // size[1], i % size[1]) for i in range(size[0] * size[1])]
    group = Group(attention[0].double().numpy(), key[0].double().numpy(), places)
    taken = fence(group.attention)
    assert set(got[0].nonzero().flatten().tolist()) == taken | sampled(group, taken, count)


def test_of_equal_attention_the_first_token_stays() -> None:
    keep = outliers(torch.full((1, 9), 1 / 9), torch.ones(1, 9, dtype=torch.bool))
    assert keep[0].tolist() == [True] + [False] * 8
    keep = outliers(torch.full((1, 9), 1 / 9), torch.ones(1, 9, dtype=torch.bool), minimum=3)
    assert keep[0].tolist() == [True] * 3 + [False] * 6


def test_a_spike_alone_stays() -> None:
    attention = torch.full((1, 9), 0.05)
    attention[0, 4] = 0.6
    assert outliers(attention, torch.ones(1, 9, dtype=torch.bool))[0].nonzero().tolist() == [[4]]


def test_tokens_without_any_attention_stay_what_they_are() -> None:
    attention = torch.zeros(1, 4)
    keep = torch.tensor([[True, False, False, True]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    index, weight, changed = merge_weights(attention, torch.randn(1, 4, 2), valid, keep, 2)
    assert index.tolist() == [[0, 3]]
    assert weight[0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert not changed.any()


def test_a_group_that_keeps_all_is_untouched() -> None:
    attention, key, _, valid = drawn([(2, 3), (2, 2)], 3, 1.0)
    index, weight, changed = merge_weights(attention, key, valid, valid, 4)
    assert not changed.any()
    assert weight[0].equal(torch.eye(6))
    assert weight[1, :4, :4].equal(torch.eye(4))
    assert index[0].tolist() == list(range(6))


@fixed
@given(
    total=st.integers(1, 200),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    minimum=st.integers(1, 5),
)
def test_counts_are_shared_out_exactly(total: int, sizes: list[int], minimum: int) -> None:
    counts = even_counts(total, sizes, minimum)
    least = sum(min(minimum, size) for size in sizes)
    assert sum(counts) == max(min(total, sum(sizes)), least)
    assert all(min(minimum, s) <= c <= s for c, s in zip(counts, sizes, strict=True))
    if sum(counts) == total and min(counts) > minimum:
        for count, size in zip(counts, sizes, strict=True):
            assert count == size or abs(count - total * size / sum(sizes)) <= 1


@pytest.mark.parametrize(
    ("grid", "count", "square", "expected"),
    [
        ((24, 24), 144, False, (12, 12)),
        ((24, 24), 576, False, (24, 24)),
        ((24, 24), 9999, False, (24, 24)),
        ((6, 6), 1, False, (1, 1)),
        ((12, 48), 144, False, (6, 24)),
        ((6, 6), 20, False, (4, 5)),
        ((6, 6), 20, True, (4, 4)),
    ],
)
def test_shrunk_grids(
    grid: tuple[int, int], count: int, square: bool, expected: tuple[int, int]
) -> None:
    assert shrunk_grid(*grid, count, square=square) == expected


@fixed
@given(grid=GRIDS, count=st.integers(1, 36), least=st.integers(1, 40), square=st.booleans())
def test_a_shrunk_grid_has_its_least(
    grid: tuple[int, int], count: int, least: int, square: bool
) -> None:
    height, width = (max(grid), max(grid)) if square else grid
    rows, columns = shrunk_grid(height, width, count, least, square=square)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns >= min(least, height * width)
    assert not square or rows == columns


@fixed
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["random", "all equal", "one spike", "few distinct"]),
)
def test_targets_and_who_joins_them_group_by_group(
    sizes: list[int], share: float, seed: int, kind: str
) -> None:
    """VisionZip's contextual tokens, of all tokens of each group."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(len(sizes), max(sizes), 4, generator=generator)
    if kind == "all equal":
        key[:] = torch.tensor([3.0, 0.0, 4.0, 0.0])
    elif kind == "one spike":
        key[:] = torch.tensor([0.0, 2.0, 0.0, 0.0])
        key[:, 0] = torch.tensor([9.0, 0.0, 0.0, 0.0])
    elif kind == "few distinct":
        key = torch.eye(4)[torch.randint(2, key.shape[:2], generator=generator)]
    valid = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    counts = [round(share * size) for size in sizes]
    target = even_targets(valid, torch.tensor(counts))
    joined = nearest_target(key, target, valid)
    assert target.sum(1).tolist() == counts
    for g, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        assert (joined[g, size:] == -1).all()
        made: dict[int, list[int]] = {}
        for token, place in enumerate(joined[g, :size].tolist()):
            made.setdefault(place, []).append(token)
        expected = joins(list(range(size)), key[g, :size], count) or {-1: list(range(size))}
        assert made == {place: sorted(tokens) for place, tokens in expected.items()}
