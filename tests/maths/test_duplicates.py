"""Leaving out tokens that repeat others, against loops over one picture."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_patch.maths import suppress, without_duplicates

fixed = settings(derandomize=True, deadline=None, max_examples=60)
SIZES = st.lists(st.integers(0, 14), min_size=1, max_size=3)


def similarities(images: int, size: int, seed: int, levels: int) -> torch.Tensor:
    """Symmetric matrices of whole numbers, many of them equal."""
    drawn = torch.Generator().manual_seed(seed)
    half = torch.randint(levels, (images, size, size), generator=drawn).float()
    return torch.maximum(half, half.mT)


def places(sizes: list[int], seed: int) -> torch.Tensor:
    """Valid tokens at any places, as many as ``sizes`` says, of one place more than the most."""
    drawn = random.Random(seed)
    valid = torch.zeros(len(sizes), max(sizes) + 1, dtype=torch.bool)
    for row, size in zip(valid, sizes, strict=True):
        row[drawn.sample(range(len(row)), size)] = True
    return valid


def one_step(alike: list[list[float]], left: list[int], number: int) -> list[int]:
    """Deal the tokens that are left into two halves, and take ``number`` of the first one away."""
    first, second = left[::2], left[1::2]
    nearest = {
        token: max((alike[token][other] for other in second), default=-1.0) for token in first
    }
    # Of equally similar tokens the later goes first.
    going = sorted(first, key=lambda token: (-nearest[token], -first.index(token)))[:number]
    return [token for token in left if token not in going]


@fixed
@given(sizes=SIZES, seed=st.integers(0, 999), levels=st.sampled_from([1, 3, 50]), data=st.data())
def test_duplicates_go_step_by_step(
    sizes: list[int], seed: int, levels: int, data: st.DataObject
) -> None:
    valid = places(sizes, seed)
    images, width = valid.shape
    similarity = similarities(images, width, seed, levels)
    drawn = torch.Generator().manual_seed(seed)
    turn = torch.stack([torch.randperm(width, generator=drawn) for _ in sizes])
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    steps = [data.draw(st.integers(1, 9)) for _ in sizes]
    kept = without_duplicates(similarity, turn, valid, counts, steps)
    for g, (count, step) in enumerate(zip(counts, steps, strict=True)):
        left = sorted(valid[g].nonzero()[:, 0].tolist(), key=turn[g].tolist().__getitem__)
        while len(left) > count:
            left = one_step(similarity[g].tolist(), left, min(step, len(left) - count))
        assert kept[g].nonzero()[:, 0].tolist() == sorted(left)


@fixed
@given(
    sizes=SIZES,
    seed=st.integers(0, 999),
    groups=st.integers(1, 3),
    threshold=st.sampled_from([0.0, 1.0, 1.5, 2.0, 9.0]),
)
def test_better_tokens_of_a_group_suppress_those_that_are_alike(
    sizes: list[int], seed: int, groups: int, threshold: float
) -> None:
    valid = places(sizes, seed)
    images, width = valid.shape
    similarity = similarities(images, width, seed, 4)
    drawn = torch.Generator().manual_seed(seed)
    rank = torch.stack([torch.randperm(width, generator=drawn) for _ in sizes])
    group = torch.randint(groups, valid.shape, generator=drawn)
    stays = suppress(similarity, rank, group, valid, torch.full((images,), threshold))
    for g in range(images):
        kept: list[int] = []
        for token in rank[g].argsort().tolist():
            beaten = any(
                group[g, token] == group[g, better] and similarity[g, token, better] > threshold
                for better in kept
            )
            if valid[g, token] and not beaten:
                kept.append(token)
        assert stays[g].nonzero()[:, 0].tolist() == sorted(kept)
