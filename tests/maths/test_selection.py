"""Greedy selections against plain statements; ties, padding, counts and batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from atp_patch.maths import (
    cosine_similarities,
    coverage_selection,
    determinantal_selection,
    max_min_selection,
    selection,
)
from tests.helpers import selection as plain

SELECTIONS = ("max-min", "determinantal", "coverage")
every = pytest.mark.parametrize("name", SELECTIONS)


def chosen(name: str, features: Tensor, weight: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """(G, n) bool as the package chooses."""
    similarity = cosine_similarities(features, valid, rounded=name != "determinantal")
    if name == "max-min":
        return max_min_selection(similarity, valid, counts)
    if name == "determinantal":
        return determinantal_selection(similarity, weight, valid, counts)
    return coverage_selection(similarity, weight, valid, counts)


def expected(name: str, features: Tensor, weight: Tensor, count: int) -> list[int]:
    """Indices as the plain statement chooses for one sample."""
    if name == "max-min":
        return sorted(plain.max_min(features, count))
    stated: Callable[..., list[int]] = {
        "determinantal": plain.determinantal,
        "coverage": plain.coverage,
    }[name]
    return sorted(stated(features, weight, count))


def one(name: str, features: Tensor, weight: Tensor, count: int) -> list[int]:
    """Indices that the package chooses for one sample."""
    valid = torch.ones(1, len(features), dtype=torch.bool)
    mask = chosen(name, features[None], weight[None], valid, torch.tensor([count]))
    return mask[0].nonzero().flatten().tolist()


def patches(size: int, width: int, seed: int) -> Tensor:
    """Features with neighbours that are alike, as those of pictures are."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(width, size // 6 + 2, generator=generator)
    smooth = torch.nn.functional.interpolate(rough[None], size=size, mode="linear")[0].T
    return smooth + 0.2 * torch.randn(size, width, generator=generator)


@every
@pytest.mark.parametrize(("size", "width", "count"), [(40, 24, 13), (70, 90, 30), (18, 8, 18)])
def test_random_features_are_chosen_as_stated(name: str, size: int, width: int, count: int) -> None:
    features = patches(size, width, size)
    weight = torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.05
    count = min(count, 18) if name == "coverage" else count  # its plain statement is slow
    assert one(name, features, weight, count) == expected(name, features, weight, count)


def axes(*numbers: int) -> Tensor:
    """Features along axes, so that cosines are 0 or 1 exactly."""
    return torch.eye(8)[list(numbers)] * torch.arange(1, len(numbers) + 1)[:, None]


DEGENERATE = {
    "all equal": (axes(*[3] * 9), 4),
    "one spike": (axes(0, 0, 0, 0, 5, 0, 0), 3),
    "fewer distinct than kept": (axes(1, 0, 0, 2, 1, 2, 0, 1), 6),
    "a feature of zeros": (axes(0, 1, 2) * torch.tensor([[1.0], [0.0], [1.0]]), 2),
    "one token": (axes(2), 1),
}


@every
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_features_are_chosen_as_stated(name: str, case: str) -> None:
    features, count = DEGENERATE[case]
    for weight in (torch.ones(len(features)), torch.arange(len(features)) / len(features)):
        assert one(name, features, weight, count) == expected(name, features, weight, count)


@pytest.mark.parametrize("case", DEGENERATE)
def test_bounds_of_gains_change_no_choice(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ALL_COMPUTED", 0)
    test_degenerate_features_are_chosen_as_stated("coverage", case)
    test_a_batch_is_its_samples_and_counts_are_met("coverage")


@every
def test_of_equal_tokens_the_first_is_taken(name: str) -> None:
    picture = patches(12, 16, 3)
    twice = picture.repeat(3, 1)  # every token three times, the products of which are rounded
    weight = torch.ones(36)
    assert one(name, twice, weight, 12) == list(range(12))
    assert one(name, twice, weight, 17) == list(range(17))


@every
def test_a_batch_is_its_samples_and_counts_are_met(name: str) -> None:
    sizes, counts = [50, 1, 33, 70, 20], [13, 1, 0, 70, 99]
    features, weight = torch.zeros(5, 70, 12), torch.rand(5, 70)
    valid = torch.zeros(5, 70, dtype=torch.bool)
    for number, size in enumerate(sizes):
        features[number, :size] = patches(size, 12, number)
        valid[number, :size] = True
    features[~valid] = 7.0  # what stands in padding is nothing
    together = chosen(name, features, weight, valid, torch.tensor(counts))
    assert together.sum(1).tolist() == [min(pair) for pair in zip(sizes, counts, strict=True)]
    for number, size in enumerate(sizes):
        if counts[number]:
            alone = one(name, features[number, :size], weight[number, :size], counts[number])
            assert together[number].nonzero().flatten().tolist() == alone


@every
def test_nothing_to_choose_from(name: str) -> None:
    for shape in ((2, 0), (0, 3), (2, 3)):
        valid = torch.zeros(shape, dtype=torch.bool)
        mask = chosen(
            name, torch.ones(*shape, 4), torch.ones(shape), valid, torch.ones(shape[0]).long()
        )
        assert mask.shape == shape
        assert not mask.any()


def test_each_determinantal_step_makes_the_determinant_largest() -> None:
    """Also beyond one block of the matrix."""
    size = 150
    features = patches(size, 160, 5)
    quality = torch.rand(size, generator=torch.Generator().manual_seed(2)) * 0.5 + 0.5
    unit = torch.nn.functional.normalize(features.double(), dim=1) * quality.double()[:, None]
    kernel = (unit @ unit.T).numpy()
    for count in (2, 50, 66, 100):
        now, before = (one("determinantal", features, quality, n) for n in (count, count - 1))
        (new,) = set(now) - set(before)
        size_of = {
            i: np.linalg.slogdet(kernel[np.ix_([*before, i], [*before, i])])[1]
            for i in set(range(size)) - set(before)
        }
        assert size_of[new] >= max(size_of.values()) - 1e-4


def test_coverage_computes_few_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds spare most of them: a plain greedy selection computes all in every step."""
    computed = 0
    plainly = selection._Rows.gain

    def counted(rows: selection._Rows, index: Tensor, covered: Tensor) -> Tensor:
        nonlocal computed
        computed += index.shape[1]
        return plainly(rows, index, covered)

    monkeypatch.setattr(selection._Rows, "gain", counted)
    features = patches(600, 40, 8)
    spared = one("coverage", features, torch.ones(600), 150)
    assert 0 < computed < 0.15 * 600 * 150
    monkeypatch.setattr(selection, "_ALL_COMPUTED", 600)
    assert one("coverage", features, torch.ones(600), 150) == spared
