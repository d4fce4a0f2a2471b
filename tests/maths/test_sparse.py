"""Raters, ranks and density peaks against plain restatements; where they degenerate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from atp_patch.maths import attention_rank, cluster_weights, density_peaks, raters, sparse
from tests.helpers.sparse import clustered, rated

fixed = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@fixed
@given(sizes=SIZES, seed=st.integers(0, 99), spread=st.floats(0.1, 2))
def test_raters_sample_by_sample(sizes: list[tuple[int, int]], seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    visual = spread * torch.randn(len(sizes), max(v for v, _ in sizes), 6, generator=generator)
    text = spread * torch.randn(len(sizes), max(t for _, t in sizes), 6, generator=generator)
    visual_valid = torch.arange(visual.shape[1]) < torch.tensor([v for v, _ in sizes])[:, None]
    text_valid = torch.arange(text.shape[1]) < torch.tensor([t for _, t in sizes])[:, None]
    found = raters(visual, visual_valid, text, text_valid)
    for b, (v, t) in enumerate(sizes):
        expected = rated(visual[b, :v].double().numpy(), text[b, :t].double().numpy())
        assert found[b, :t].tolist() == expected
        assert not found[b, t:].any()


def test_alike_text_rates_and_no_text_does_not() -> None:
    seen = torch.ones(2, 3, dtype=torch.bool)
    text = torch.ones(2, 7, 4) / 3
    valid = torch.tensor([[True] * 7, [False] * 7])
    assert raters(torch.randn(2, 3, 4), seen, text, valid).tolist() == valid.tolist()
    assert raters(torch.randn(2, 3, 4), seen, text[:, :0], valid[:, :0]).shape == (2, 0)


def test_the_rank_is_the_number_of_independent_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(4, 6, 9)
    for b, rank in enumerate((1, 3, 0, 5)):
        mix = torch.randn(5, rank, generator=generator)
        rows[b, :5, :8] = mix @ torch.randn(rank, 8, generator=generator)
    assert attention_rank(rows, 1e-3).tolist() == [1, 3, 0, 5]
    assert attention_rank(rows[:, :0], 1e-3).tolist() == [0] * 4
    nearly = torch.eye(3)[None] * torch.tensor([1.0, 1e-2, 1e-4])
    assert attention_rank(nearly, 1e-3).tolist() == [2]


@fixed
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    neighbours=st.integers(1, 6),
    far=st.sampled_from([0.0, 300.0]),
)
def test_density_peaks_sample_by_sample(
    sizes: list[tuple[int, int]], seed: int, neighbours: int, far: float
) -> None:
    """Also where densities underflow, for tokens are hundreds of units from each other."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(size, min(count, size)) for size, count in sizes]
    longest = max(size for size, _ in sizes)
    x = torch.randn(len(sizes), longest, 5, generator=generator)
    x = x + far * torch.randint(0, 3, (len(sizes), longest, 1), generator=generator)
    valid = torch.arange(longest) < torch.tensor([size for size, _ in sizes])[:, None]
    counts = torch.tensor([count for _, count in sizes])
    centre = density_peaks(x, valid, counts, neighbours)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sparse, "_HELD", 1)
        assert torch.equal(density_peaks(x, valid, counts, neighbours), centre), "row by row"
    places = [torch.randperm(longest + 2, generator=generator) for _ in sizes]
    index = torch.stack(places)[:, :longest]
    for mean in (False, True):
        column, used, weight = cluster_weights(index, centre, longest + 2, mean=mean)
        for b, (size, count) in enumerate(sizes):
            expected = clustered(x[b, :size].double().numpy(), count, neighbours) if count else {}
            assert used[b].sum() == count
            for slot, (home, members) in enumerate(expected.items()):
                assert column[b, slot] == index[b, home]
                share = np.zeros(longest + 2)
                share[index[b, members].numpy()] = 1 / len(members) if mean else 1
                np.testing.assert_allclose(weight[b, slot].numpy(), share, atol=1e-6)
            assert (weight[b, count:] == 0).all()


def test_equal_tokens_make_a_cluster() -> None:
    x = torch.ones(1, 4, 3)
    valid = torch.ones(1, 4, dtype=torch.bool)
    assert density_peaks(x, valid, torch.tensor([1]), 5).tolist() == [[0, 0, 0, 0]]
    assert density_peaks(x, valid, torch.tensor([0]), 5).tolist() == [[-1, -1, -1, -1]]
    assert density_peaks(x[:, :0], valid[:, :0], torch.tensor([0]), 5).shape == (1, 0)


def _peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch holds on the CPU while it works."""
    with profile(profile_memory=True) as profiled:
        work()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_clusters_hold_their_distances_and_their_weights_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two matrices of distances in the making, and one of weights, grow with the tokens squared."""
    monkeypatch.setattr(sparse, "_HELD", 2**14)
    tokens, clusters = 600, 200
    x = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(0))
    valid, counts = torch.ones(1, tokens, dtype=torch.bool), torch.tensor([clusters])
    assert _peak_bytes(lambda: density_peaks(x, valid, counts, 5)) < 2.5 * 4 * tokens**2
    centre = density_peaks(x, valid, counts, 5)
    index = torch.arange(tokens)[None]
    made = _peak_bytes(lambda: cluster_weights(index, centre, tokens, mean=True))
    assert made < 1.5 * 4 * clusters * tokens
