"""Scores against full attention maps, written out with loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atp_patch.maths import (
    cross_rows,
    cross_scores,
    normalise_scores,
    redundant_scores,
    scores,
    self_scores,
)

HEADS = [(4, 4), (4, 2), (6, 1)]


@pytest.fixture(params=[False, True], ids=["together", "one by one"], autouse=True)
def _held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples scored together, and each alone, as large ones are."""
    if request.param:
        monkeypatch.setattr(scores, "_HELD_ON_CPU", 1)


def attention_logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(B, H, Q, K) one number at a time."""
    batch, heads, rows, _ = query.shape
    groups = heads // key.shape[1]
    logits = torch.zeros(batch, heads, rows, key.shape[2])
    for b in range(batch):
        for h in range(heads):
            for m in range(rows):
                for n in range(key.shape[2]):
                    logits[b, h, m, n] = query[b, h, m] @ key[b, h // groups, n] * scaling
    return logits


def case(heads: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(3, heads[0], 7, 5, generator=generator)
    key = torch.randn(3, heads[1], 7, 5, generator=generator)
    valid = torch.arange(7) < torch.tensor([[7], [4], [1]])
    return query, key, valid


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_self_scores_are_mean_logits(heads: tuple[int, int], causal: bool) -> None:
    query, key, valid = case(heads)
    logits = attention_logits(query, key, 0.3)
    got = self_scores(query, key, valid, 0.3, causal=causal)
    for b in range(3):
        count = int(valid[b].sum())
        for n in range(7):
            rows = range(n if causal else 0, count)
            expected = float(logits[b, :, list(rows), n].mean()) if n < count and len(rows) else 0.0
            assert float(got[b, n]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("mask_kind", [None, "bool", "float"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 64])
def test_cross_scores_are_mean_probabilities(
    heads: tuple[int, int], renormalise: bool, mask_kind: str | None, chunk_rows: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, heads[0], 5, 4, generator=generator)
    key = torch.randn(2, heads[1], 9, 4, generator=generator)
    row_valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    index = torch.tensor([[1, 2, 4], [0, 3, 3]])
    valid = torch.tensor([[True] * 3, [True, True, False]])
    seen = torch.rand(2, 1, 5, 9, generator=generator) < 0.7
    seen[..., 0] = True
    seen_all = torch.ones_like(seen) if mask_kind is None else seen
    masks = {
        None: None,
        "bool": seen,
        "float": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
    }
    given = (query, key, row_valid, index, valid, 0.5)
    how: dict[str, Any] = {"mask": masks[mask_kind], "renormalise": renormalise}
    got = cross_scores(*given, **how, chunk_rows=chunk_rows)
    rows = cross_rows(*given, **how)
    torch.testing.assert_close(got, rows.sum(1) / row_valid.sum(1, keepdim=True))
    logits = attention_logits(query, key, 0.5).masked_fill(~seen_all, -torch.inf)
    probability = logits.softmax(-1)
    for b in range(2):
        columns = index[b][valid[b]]
        rows = probability[b][:, row_valid[b]][:, :, columns]
        if renormalise:
            rows = rows / rows.sum(-1, keepdim=True)
        rows = rows.nan_to_num()
        torch.testing.assert_close(got[b, : len(columns)], rows.mean((0, 1)))
        assert bool((got[b, len(columns) :] == 0).all())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_self_scores_of_each_head(heads: tuple[int, int], causal: bool) -> None:
    query, key, valid = case(heads)
    logits = attention_logits(query, key, 0.3)
    got = self_scores(query, key, valid, 0.3, causal=causal, per_head=True)
    assert got.shape == (3, heads[0], 7)
    for b in range(3):
        count = int(valid[b].sum())
        for n in range(7):
            rows = range(n if causal else 0, count)
            for h in range(heads[0]):
                seen = n < count and len(rows) > 0
                expected = float(logits[b, h, list(rows), n].mean()) if seen else 0.0
                assert float(got[b, h, n]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 64])
def test_cross_scores_and_rows_of_each_head(
    heads: tuple[int, int], renormalise: bool, chunk_rows: int
) -> None:
    query, key, row_valid = case(heads)
    index = torch.tensor([[1, 3, 6], [0, 2, 5], [4, 5, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    logits = attention_logits(query, key, 0.3)
    how = {"renormalise": renormalise, "per_head": True}
    rows = cross_rows(query, key, row_valid, index, valid, 0.3, **how)
    got = cross_scores(query, key, row_valid, index, valid, 0.3, chunk_rows=chunk_rows, **how)
    assert rows.shape == (3, heads[0], 7, 3)
    for b in range(3):
        places = index[b, valid[b]].tolist()
        for h in range(heads[0]):
            total = torch.zeros(len(places))
            for t in range(7):
                one = logits[b, h, t]
                paid = one[places].softmax(0) if renormalise else one.softmax(0)[places]
                paid = paid * row_valid[b, t]
                torch.testing.assert_close(rows[b, h, t, valid[b]], paid, rtol=1e-5, atol=1e-6)
                total += paid
            mean = total / row_valid[b].sum()
            torch.testing.assert_close(got[b, h, valid[b]], mean, rtol=1e-5, atol=1e-6)
            assert not got[b, h, ~valid[b]].any()


def test_cross_scores_without_a_row_are_zero() -> None:
    query, key = torch.randn(1, 2, 0, 4), torch.randn(1, 2, 3, 4)
    none = torch.zeros(1, 0, dtype=torch.bool)
    index, valid = torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool)
    assert cross_scores(query, key, none, index, valid, 1.0).tolist() == [[0.0, 0.0, 0.0]]


def test_what_stands_in_invalid_slots_does_not_matter() -> None:
    query, key, valid = case((4, 2))
    spoiled_query, spoiled_key = query.clone(), key.clone()
    for b in range(3):
        spoiled_query[b, :, ~valid[b]] = 1e6
        spoiled_key[b, :, ~valid[b]] = -1e6
    for causal in (False, True):
        clean = self_scores(query, key, valid, 1.0, causal=causal)
        spoiled = self_scores(spoiled_query, spoiled_key, valid, 1.0, causal=causal)
        assert torch.equal(clean, spoiled)


def test_half_precision_inputs_are_scored_in_float32() -> None:
    query, key, valid = case((4, 2))
    exact = self_scores(query, key, valid, 0.4)
    half = self_scores(query.bfloat16(), key.bfloat16(), valid, 0.4)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.integers(0, 5),
    st.sampled_from(["rank", "minmax", "none"]),
)
def test_normalised_scores(values: list[int], spare: int, mode: str) -> None:
    scores = torch.tensor([[*values, *[99] * spare]], dtype=torch.float32)
    valid = torch.arange(len(values) + spare)[None] < len(values)
    got = normalise_scores(scores, valid, mode)[0]
    assert got[len(values) :].tolist() == [0.0] * spare
    low, high = min(values), max(values)
    for i, value in enumerate(values):
        if mode == "rank":
            below = sum(
                other < value or (other == value and j > i) for j, other in enumerate(values)
            )
            expected = (below + 0.5) / len(values)
        elif mode == "minmax":
            expected = 0.5 if low == high else (value - low) / (high - low)
        else:
            expected = value
        assert float(got[i]) == pytest.approx(expected)


@pytest.mark.parametrize("score", ["mean", "cross", "self"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_rank_threshold_prunes_its_share(score: str, share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    s_self, s_cross = torch.randn(2, 4, 40, generator=generator)
    valid = torch.ones(4, 40, dtype=torch.bool)
    redundant = redundant_scores(s_self, s_cross, valid, score=score, norm="rank")
    assert (redundant < share).sum(1).tolist() == [round(share * 40)] * 4


def test_the_printed_mean_is_a_plain_mean() -> None:
    s_self, s_cross = torch.randn(2, 1, 6)
    valid = torch.ones(1, 6, dtype=torch.bool)
    got = redundant_scores(s_self, s_cross, valid, score="mean", norm="none")
    torch.testing.assert_close(got, (s_self + s_cross) / 2)


def test_unknown_words_are_refused() -> None:
    scores, valid = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="rank, minmax or none"):
        normalise_scores(scores, valid, "softmax")
    with pytest.raises(ValueError, match="mean, cross or self"):
        redundant_scores(scores, scores, valid, score="max", norm="none")


def one_case(seed: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three rows of which two count, five keys of which the visual ones are 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, 3, 4, generator=generator)
    key = torch.randn(1, 2, 5, 4, generator=generator)
    rows = torch.tensor([[True, True, False]])
    return query, key, rows, torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_rows_that_do_not_count_may_hold_anything(renormalise: bool, garbage: float) -> None:
    query, key, rows, index, valid = one_case()
    clean = cross_scores(query, key, rows, index, valid, 0.5, renormalise=renormalise)
    query[:, :, 2] = garbage
    spoiled = cross_scores(query, key, rows, index, valid, 0.5, renormalise=renormalise)
    assert torch.equal(clean, spoiled)


@pytest.mark.parametrize("renormalise", [False, True])
def test_rows_whose_mask_hides_every_key_add_nothing(renormalise: bool) -> None:
    """Padding rows of a float mask are often -inf throughout, which is NaN in a plain softmax."""
    query, key, rows, index, valid = one_case()
    clean = cross_scores(query, key, rows, index, valid, 0.5, renormalise=renormalise)
    for least in (-torch.inf, torch.finfo(torch.float32).min):
        mask = torch.zeros(1, 1, 3, 5)
        mask[:, :, 2] = least
        got = cross_scores(query, key, rows, index, valid, 0.5, mask=mask, renormalise=renormalise)
        assert torch.equal(got, clean)
        mask[:, :, 1] = least
        got = cross_scores(query, key, rows, index, valid, 0.5, mask=mask, renormalise=renormalise)
        alone = torch.tensor([[True, False, False]])
        first = cross_scores(query, key, alone, index, valid, 0.5, renormalise=renormalise)
        torch.testing.assert_close(got, first / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renormalise", [False, True])
def test_every_form_of_a_mask_means_the_same(dtype: torch.dtype, renormalise: bool) -> None:
    query, key, rows, index, valid = one_case()
    # The second row sees text alone: it pays the visual tokens nothing, renormalised or not.
    seen = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    least = torch.finfo(dtype).min
    added = torch.zeros(3, 5, dtype=dtype).masked_fill(~seen, least)
    forms = [
        seen,
        seen[None, None],
        seen.expand(1, 4, 3, 5),
        added,
        added[None, None],
        (added + added)[None],  # causal and padding masks summed: -inf
    ]
    first, *others = (
        cross_scores(query, key, rows, index, valid, 0.5, mask=m, renormalise=renormalise)
        for m in forms
    )
    for other in others:
        torch.testing.assert_close(other, first)
    assert float(first[0, 1]) == 0.0
    if renormalise:
        assert float(first[0, 0]) == pytest.approx(0.5)  # all of the first row, none of the second


def test_a_mask_of_one_row_is_for_every_row() -> None:
    query, key, rows, index, valid = one_case()
    mask = torch.tensor([True, True, True, False, False]).reshape(1, 1, 1, 5)
    got = cross_scores(query, key, rows, index, valid, 0.5, mask=mask)
    short = cross_scores(query, key[:, :, :3], rows, index, valid, 0.5)
    torch.testing.assert_close(got, short)


def test_renormalised_scores_survive_text_that_draws_all_attention() -> None:
    query, key, rows, index, valid = one_case()
    query = query.abs() * 100
    key[:, :, 4] = 50.0
    assert cross_scores(query, key, rows, index, valid, 0.5).tolist() == [[0.0, 0.0]]
    got = cross_scores(query, key, rows, index, valid, 0.5, renormalise=True)
    assert float(got.sum()) == pytest.approx(1.0)


def test_float16_logits_do_not_overflow_before_they_are_scaled() -> None:
    query, key = torch.full((1, 1, 1, 64), 60.0).half(), torch.full((1, 1, 3, 64), 60.0).half()
    index, ones = torch.arange(2)[None], torch.ones(1, 2, dtype=torch.bool)
    got = cross_scores(query, key, ones[:, :1], index, ones, 64**-0.5)
    torch.testing.assert_close(got, torch.full((1, 2), 1 / 3))
    assert bool(self_scores(query, key[:, :, :1], ones[:, :1], 64**-0.5).isfinite().all())


@pytest.mark.parametrize("mode", ["rank", "minmax", "none"])
@pytest.mark.parametrize("garbage", [float("inf"), float("-inf"), float("nan")])
def test_invalid_scores_do_not_matter(mode: str, garbage: float) -> None:
    scores = torch.tensor([[0.3, 0.0, -2.0, 0.0, 5.0], [0.0] * 5])
    valid = torch.tensor([[True, False, True, False, True], [False] * 5])
    clean = normalise_scores(scores, valid, mode)
    spoiled = normalise_scores(scores.masked_fill(~valid, garbage), valid, mode)
    assert torch.equal(clean, spoiled)
    assert clean[1].tolist() == [0.0] * 5
