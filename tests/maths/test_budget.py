"""Counts that meet a budget, and thresholds that meet counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_patch.maths import (
    average_tokens,
    budget_thresholds,
    hard_keep,
    keep_counts,
    kv_bytes,
    layer_flops,
    minimum_target,
    normalise_scores,
    paper_flops_reduction,
    paper_layer_flops,
    paper_proportions,
    prefill_flops,
    progressive_order,
    spatial_scores,
    target_counts,
)


def test_the_papers_averages() -> None:
    assert average_tokens(576, [126, 88, 20], [4, 14, 24], 32) == pytest.approx(143.9, abs=0.05)
    assert average_tokens(576, [98, 79, 16], [1, 13, 25], 32) == pytest.approx(87.9, abs=0.05)


def test_the_papers_proportions() -> None:
    assert paper_proportions(3) == pytest.approx((1, 88 / 126, 20 / 126))
    assert paper_proportions(1) == (1.0,)
    assert paper_proportions(2) == pytest.approx((1, 20 / 126))
    assert len(paper_proportions(7)) == 7


layer_sets = st.integers(3, 40).flatmap(
    lambda depth: st.tuples(
        st.just(depth), st.sets(st.integers(1, depth - 1), min_size=1, max_size=4).map(sorted)
    )
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layer_sets, st.integers(1, 3000), st.floats(0.001, 1.2))
def test_target_counts_are_the_budget(
    depth_and_layers: tuple[int, list[int]], total: int, share: float
) -> None:
    depth, layers = depth_and_layers
    target = share * total
    if target < minimum_target(total, layers, depth) and target < total:
        with pytest.raises(ValueError, match="least possible"):
            target_counts(total, layers, depth, target)
        return
    counts = target_counts(total, layers, depth, target)
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    assert counts[0] <= total
    average = average_tokens(total, counts, layers, depth)
    assert abs(average - min(target, total)) <= 0.5


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layer_sets, st.integers(1, 3000), st.floats(0.001, 1.2), st.floats(0, 1))
def test_a_minimum_is_part_of_the_budget(
    depth_and_layers: tuple[int, list[int]], total: int, share: float, least_share: float
) -> None:
    depth, layers = depth_and_layers
    target, minimum = share * total, max(round(least_share * total), 1)
    if target < minimum_target(total, layers, depth, minimum):
        with pytest.raises(ValueError, match="least possible"):
            target_counts(total, layers, depth, target, minimum=minimum)
        return
    counts = target_counts(total, layers, depth, target, minimum=minimum)
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] >= minimum
    assert abs(average_tokens(total, counts, layers, depth) - min(target, total)) <= 0.5


def test_target_counts_are_the_papers() -> None:
    counts = target_counts(576, [4, 14, 24], 32, 143.9)
    assert counts == pytest.approx((126, 88, 20), abs=1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.floats(1e-3, 1e3),
    st.floats(100, 576),
)
def test_proportions_may_be_on_any_scale(shares: list[float], scale: float, target: float) -> None:
    counts = target_counts(576, [4, 14, 24], 32, target, [share * scale for share in shares])
    assert abs(average_tokens(576, counts, [4, 14, 24], 32) - target) <= 0.5
    assert list(counts) == sorted(counts, reverse=True)


@pytest.mark.parametrize("proportions", [(1.0,), (1.0, 0.5, 0.0), (1.0, -1.0, 0.5), ()])
def test_proportions_that_cannot_be_are_refused(proportions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one positive number for each"):
        target_counts(576, [4, 14, 24], 32, 144.0, proportions)


def test_keep_counts_are_shares_of_what_is_left() -> None:
    assert keep_counts(576, [1 / 3] * 3) == (192, 64, 21)
    assert keep_counts(576, [0.001, 1.0], minimum=5) == (5, 5)
    assert keep_counts(3, [0.1, 0.1], minimum=5) == (3, 3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.floats(0, 1),
    st.sampled_from(["progressive", "strided"]),
    st.integers(0, 10_000),
    st.data(),
)
def test_thresholds_keep_exactly_the_counts(
    height: int, width: int, share: float, order: str, seed: int, data: st.DataObject
) -> None:
    """Any count, with some tokens gone and some slots empty."""
    generator = torch.Generator().manual_seed(seed)
    places = height * width
    valid = torch.rand(2, places + 2, generator=generator) < 0.8
    valid[:, places:] = False
    spatial = spatial_scores(height, width, order=order)
    spatial = torch.nn.functional.pad(spatial, (0, 2), value=1.0).expand(2, -1)
    raw = torch.randn(2, places + 2, generator=generator)
    redundant = normalise_scores(raw, valid, "rank")
    counts = torch.tensor([data.draw(st.integers(0, int(row.sum()))) for row in valid])
    theta_r, theta_s = budget_thresholds(redundant, spatial, valid, counts, share)
    keep = hard_keep(redundant, spatial, theta_r, theta_s, valid)
    assert keep.sum(1).tolist() == counts.tolist()
    by_place = (spatial >= theta_s[:, None]) & valid
    assert bool((by_place.sum(1) <= (counts * share).round()).all())
    assert not bool((by_place & (spatial == 0)).any())
    for b in range(2):
        # Of those not taken for their place, the best by redundant score stay.
        rest = [i for i in range(places) if valid[b, i] and not by_place[b, i]]
        best = sorted(rest, key=lambda i: -float(redundant[b, i]))
        taken = int(counts[b] - by_place[b].sum())
        assert sorted(i for i in rest if keep[b, i]) == sorted(best[:taken])


def test_the_spatial_part_has_its_share_where_the_order_allows() -> None:
    valid = torch.ones(1, 576, dtype=torch.bool)
    redundant = normalise_scores(torch.rand(1, 576), valid, "rank")
    spatial = spatial_scores(24, 24)[None]
    _, theta_s = budget_thresholds(redundant, spatial, valid, torch.tensor([126]), 0.25)
    taken = spatial[0] >= theta_s
    assert int(taken.sum()) == round(0.25 * 126)
    assert bool((progressive_order(24, 24)[taken] < 32).all())


def test_flops_by_hand() -> None:
    assert paper_layer_flops(10, 8, 16) == 4 * 10 * 64 + 2 * 100 * 8 + 2 * 10 * 8 * 16
    saved = paper_flops_reduction(10, [6, 2], [1, 3], 4, 8, 16)
    full, six, two = (paper_layer_flops(n, 8, 16) for n in (10, 6, 2))
    assert saved == 2 * (full - six) + 1 * (full - two)
    # One token, one head of size 2 in a hidden size of 2, MLP of 3, by counting multiply-adds:
    # q, k, v, o 2x2 each; scores 2; values 2; MLP three 2x3 matrices.
    assert layer_flops(1, 1, 2, 3, 1, 1, 2) == 2 * (4 * 4 + 2 + 2 + 3 * 6)
    assert layer_flops(1, 1, 2, 3, 1, 1, 2, gated=False) == 2 * (4 * 4 + 2 + 2 + 2 * 6)
    # Grouped queries: 4 heads read 2 key heads.
    assert layer_flops(3, 5, 8, 0, 4, 2, 2) == 2 * (3 * 8 * 2 * (4 + 4 + 2 + 2) + 2 * 3 * 5 * 8)


def test_prefill_flops_of_llava_7b() -> None:
    sizes = {
        "hidden_size": 4096,
        "mlp_sizes": [11008] * 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "vocab_size": 32000,
    }
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    expected = 2 * 640 * matrices + 32 * 4 * 640**2 * 4096 + 2 * 4096 * 32000
    assert prefill_flops([640] * 32, **sizes) == expected


def test_cache_bytes_of_the_paper() -> None:
    """302.4, 75.6 and 46.2 MB for 576, 144 and 88 tokens in 16 bits, read as 10^6 bytes."""
    assert kv_bytes([1] * 32, 32, 128, 2) == 524_288
    for tokens, printed in ((576, 302.4), (144, 75.6), (88, 46.2)):
        assert kv_bytes([tokens] * 32, 32, 128, 2) / 1e6 == pytest.approx(printed, rel=2e-3)
        assert kv_bytes([tokens] * 32, 32, 128, 2) / 2**20 != pytest.approx(printed, rel=4e-2)


def test_the_papers_flops_on_visual_tokens() -> None:
    """75.3 % by eq. 15-16 over 576 visual tokens alone; Table 6's 78.1 % is 1 - 2.1 T / 9.6 T."""
    saved = paper_flops_reduction(576, [126, 88, 20], [4, 14, 24], 32, 4096, 11008)
    full = 32 * paper_layer_flops(576, 4096, 11008)
    assert saved / full == pytest.approx(0.753, abs=5e-4)


@pytest.mark.parametrize("tokens", range(1, 13))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_thresholds_meet_every_count_of_small_images(tokens: int, share: float) -> None:
    """All counts at once, as a batch; invalid slots hold what would win if it counted."""
    batch = tokens + 1
    generator = torch.Generator().manual_seed(tokens)
    valid = torch.zeros(batch, tokens + 3, dtype=torch.bool)
    valid[:, torch.randperm(tokens + 3, generator=generator)[:tokens]] = True
    raw = torch.randn(batch, tokens + 3, generator=generator)
    redundant = normalise_scores(raw, valid, "rank").masked_fill(~valid, float("nan"))
    spatial = torch.randint(0, 4, valid.shape, generator=generator) / 4
    spatial = spatial.masked_fill(~valid, float("inf"))
    counts = torch.arange(batch)
    thetas = budget_thresholds(redundant, spatial, valid, counts, share)
    keep = hard_keep(redundant, spatial, *thetas, valid)
    assert keep.sum(1).tolist() == counts.tolist()
    assert not bool((keep & ~valid).any())


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_lie_strictly_between_scores(seed: int) -> None:
    """So a last bit of rounding in a score changes no decision."""
    valid = torch.ones(2, 576, dtype=torch.bool)
    raw = torch.rand(2, 576, generator=torch.Generator().manual_seed(seed))
    redundant = normalise_scores(raw, valid, "rank")
    spatial = spatial_scores(24, 24).expand(2, -1)
    counts = torch.tensor([88, 126])
    theta_r, theta_s = budget_thresholds(redundant, spatial, valid, counts, 0.25)
    # A token kept for its place stays whatever its redundant score: only the others have a margin.
    others = spatial < theta_s[:, None]
    assert float((redundant - theta_r[:, None]).abs()[others].min()) > 0.4 / 576
    assert float((spatial - theta_s[:, None]).abs().min()) > 0.4 * 3 / 576


def test_no_tokens_and_no_samples() -> None:
    for batch, tokens in ((2, 0), (0, 5), (0, 0)):
        scores, valid = torch.zeros(batch, tokens), torch.ones(batch, tokens, dtype=torch.bool)
        counts = torch.zeros(batch, dtype=torch.long)
        thetas = budget_thresholds(scores, scores, valid, counts, 0.25)
        assert hard_keep(scores, scores, *thetas, valid).shape == (batch, tokens)
