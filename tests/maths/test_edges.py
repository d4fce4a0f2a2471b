"""Defaults, edges and constants of the mathematics that mutation testing found untested."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atp_patch.maths import (
    attention_rank,
    average_tokens,
    density_peaks,
    even_counts,
    even_targets,
    insert_voco_tokens,
    keep_counts,
    minimum_target,
    nearest_target,
    pack,
    paper_flops_reduction,
    prefill_flops,
    scatter_tokens,
    self_scores,
    standardise_scores,
    starting_thresholds,
    target_counts,
    to_reference_grid,
)

# -- budgets ---------------------------------------------------------------------------------------


def test_starting_thresholds_by_hand() -> None:
    """A half stays and then a quarter, three tenths of either for their place; slope 3."""
    first, second = starting_thresholds([0.5, 0.25], 0.3, 3.0)
    # Of all, 0.15 stay for their place; of the other 0.85, 0.35 by rank.
    assert first == pytest.approx((1 - 0.35 / 0.85, 1 - 3 * 0.15))
    # Of the half that is left, 0.075 of all stay for their place; of the other 0.425, 0.175.
    assert second == pytest.approx((1 - 0.175 / 0.425, 1 - 3 * 0.075))


def test_starting_thresholds_take_no_more_places_than_have_a_score() -> None:
    """With slope 3 a third of the places have a spatial score above 0."""
    ((redundant, spatial),) = starting_thresholds([0.5], 1.0, 3.0)
    assert spatial == pytest.approx(0.05)
    assert redundant == pytest.approx(1 - (0.5 - 0.95 / 3) / (1 - 0.95 / 3))


def test_starting_thresholds_where_places_alone_decide() -> None:
    assert starting_thresholds([1.0], 1.0, 0.5) == [(1.0, 0.5)]


@pytest.mark.parametrize(("layers", "num_layers"), [([1], 40), ([2], 3), ([1, 2], 30)])
def test_every_count_of_a_budget_can_be_asked_for(layers: list[int], num_layers: int) -> None:
    for count in range(1, 101):
        counts = [count] * len(layers)
        target = average_tokens(100, counts, layers, num_layers)
        met = target_counts(100, layers, num_layers, target, [1.0] * len(layers))
        assert met == tuple(counts)


def test_one_token_is_the_least_unless_told_otherwise() -> None:
    assert minimum_target(10, [1], 2) == 5.5
    assert keep_counts(100, [0.001, 0.5]) == (1, 1)
    assert target_counts(100, [1], 2, 50.5) == (1,)
    assert even_counts(2, [9, 9, 9]) == [1, 1, 1]


def test_a_count_a_layer_is_asked_for() -> None:
    with pytest.raises(ValueError, match="zip"):
        average_tokens(10, [4, 2], [1], 4)
    with pytest.raises(ValueError, match="zip"):
        paper_flops_reduction(10, [4, 2], [1], 4, 8, 8)
    sizes = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "vocab_size": 9}
    with pytest.raises(ValueError, match="zip"):
        prefill_flops([3, 3], mlp_sizes=[8, 8, 8], **sizes)


def test_the_largest_remainders_are_rounded_up() -> None:
    assert even_counts(7, [10, 20, 30]) == [1, 2, 4]  # 1.17, 2.33 and 3.5
    assert even_counts(8, [10, 20, 30]) == [1, 3, 4]  # 1.33, 2.67 and 4
    assert even_counts(5, [1, 50, 50], minimum=2) == [1, 2, 2]


def test_the_head_runs_once_a_row_of_logits() -> None:
    sizes = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "vocab_size": 9}
    one, three = (prefill_flops([3], mlp_sizes=[8], **sizes, logits_rows=n) for n in (1, 3))
    assert three - one == 2 * (2 * 8 * 9)
    assert prefill_flops([3], mlp_sizes=[8], **sizes) == one


# -- indices ---------------------------------------------------------------------------------------


def test_rows_without_places_are_packed_to_nothing() -> None:
    index, valid = pack(torch.zeros(2, 0, dtype=torch.bool))
    assert index.shape == valid.shape == (2, 0)
    assert index.dtype == torch.long


def test_places_that_were_not_kept_hold_zero() -> None:
    index, valid = torch.tensor([[2, 0]]), torch.tensor([[True, False]])
    rows = torch.tensor([[[5.0, 6.0], [7.0, 8.0]]])
    assert scatter_tokens(rows, index, valid, 3).tolist() == [[[0, 0], [0, 0], [5, 6]]]


# -- scores ----------------------------------------------------------------------------------------


def test_every_query_counts_unless_told_otherwise() -> None:
    query = torch.tensor([[[[1.0], [3.0]]]])
    key, valid = torch.ones(1, 1, 2, 1), torch.ones(1, 2, dtype=torch.bool)
    assert self_scores(query, key, valid, 1.0).tolist() == [[2.0, 2.0]]
    assert self_scores(query, key, valid, 1.0, causal=True).tolist() == [[2.0, 3.0]]


def test_standardised_scores_have_mean_0_and_variance_1_over_valid_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 5 + 3 * torch.randn(3, 8, generator=generator)
    valid = torch.arange(8) < torch.tensor([[8], [5], [1]])
    got = standardise_scores(scores.masked_fill(~valid, 1e6), valid)
    for b, count in enumerate((8, 5)):
        row = scores[b, :count].double().numpy()
        expected = (row - row.mean()) / np.sqrt(row.var() + 1e-6)
        np.testing.assert_allclose(got[b, :count].numpy(), expected, atol=1e-5)
    assert not got[~valid].any()
    assert got[2].tolist() == [0.0] * 8


def test_scores_that_hardly_differ_are_not_blown_up() -> None:
    scores = torch.tensor([[0.5, 0.5001], [0.5, 0.5]])
    got = standardise_scores(scores, torch.ones(2, 2, dtype=torch.bool))
    # A variance of 2.5e-9 beside the 1e-6 that is added to it.
    assert got[0].tolist() == pytest.approx([-0.05, 0.05], abs=1e-3)
    assert got[1].tolist() == [0.0, 0.0]


def test_samples_without_valid_tokens_have_scores_of_zero() -> None:
    got = standardise_scores(torch.full((1, 3), torch.nan), torch.zeros(1, 3, dtype=torch.bool))
    assert got.tolist() == [[0.0, 0.0, 0.0]]


# -- ranks and clusters ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_rank_does_not_depend_on_the_scale(scale: float) -> None:
    rows = scale * torch.diag(torch.tensor([1.0, 1e-2, 1e-4]))[None]
    assert attention_rank(rows, 1e-3).tolist() == [2]


def test_one_number_is_a_matrix_of_rank_one() -> None:
    assert attention_rank(torch.tensor([[[0.5]]]), 1e-3).tolist() == [1]


def test_no_tokens_join_no_centre() -> None:
    none = density_peaks(torch.zeros(2, 0, 3), torch.zeros(2, 0).bool(), torch.zeros(2).long(), 5)
    assert none.shape == (2, 0)
    assert none.dtype == torch.long


# -- sequences and grids ---------------------------------------------------------------------------


def test_slots_move_as_a_whole() -> None:
    sequence = insert_voco_tokens([[(1, 4)]], length=5, num_tokens=2).to(torch.device("meta"))
    for name in ("place", "voco", "segment", "valid"):
        moved = getattr(sequence, name)
        assert moved.device.type == "meta"
        assert moved.shape == (1, 7)


def test_the_reference_grid_has_the_papers_side() -> None:
    values, place = torch.ones(1, 1), torch.zeros(1, 1).long()
    one = torch.ones(1, 1)
    got = to_reference_grid(values, place, place, place, one.bool(), one.long(), one.long())
    assert got.shape == (1, 24, 24)


def test_a_larger_grid_is_averaged_and_not_sampled() -> None:
    """Every fourth column holds 1: a resized place sees a quarter of it, wherever it lies."""
    row, column = (
        x.flatten()[None] for x in torch.meshgrid(*[torch.arange(16)] * 2, indexing="ij")
    )
    values = (column % 4 == 0).float()
    sizes = torch.tensor([[16]])
    got = to_reference_grid(
        values, torch.zeros_like(row), row, column, torch.ones_like(row).bool(), sizes, sizes, 4
    )
    assert got.min() > 0.15
    assert got.max() < 0.35


def test_even_targets_are_every_rth_valid_token() -> None:
    torch.manual_seed(0)
    valid = torch.rand(6, 17) < 0.7
    valid[5] = False
    counts = torch.tensor([1, 2, 3, 5, 30, 0])
    counts = torch.minimum(counts, valid.sum(1))
    found = even_targets(valid, counts)
    for row, count, chosen in zip(valid.tolist(), counts.tolist(), found.tolist(), strict=True):
        places = [place for place, there in enumerate(row) if there]
        step = len(places) // count if count else 1
        assert [place for place, there in enumerate(chosen) if there] == places[::step][:count]


def test_each_member_goes_to_its_most_similar_target() -> None:
    torch.manual_seed(0)
    key = torch.randn(4, 9, 5) * torch.rand(4, 9, 1)
    key[1, 4] = key[1, 2]  # two targets that are equally near to everything
    member = torch.rand(4, 9) < 0.8
    target = member & (torch.rand(4, 9) < 0.5)
    member[1], target[1] = True, False
    target[1, [2, 4]] = True
    target[3] = False  # nothing to go to
    found = nearest_target(key, target, member)
    assert found.dtype == torch.int64
    for g in range(4):
        for i in range(9):
            targets = [j for j in range(9) if target[g, j]]
            if not member[g, i] or not targets:
                assert found[g, i] == -1
            elif target[g, i]:
                assert found[g, i] == i
            else:
                cosine = [
                    float(torch.cosine_similarity(key[g, i], key[g, j], dim=0)) for j in targets
                ]
                best = max(cosine)
                assert found[g, i] == next(
                    j for j, c in zip(targets, cosine, strict=True) if c > best - 1e-6
                )


def test_without_any_target_no_member_goes_anywhere() -> None:
    none = torch.zeros(2, 3, dtype=torch.bool)
    found = nearest_target(torch.randn(2, 3, 4), none, ~none)
    assert found.tolist() == [[-1] * 3] * 2
    assert found.dtype == torch.int64


def test_layers_with_mixers_of_their_own_count_their_weights() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "mlp_sizes": [16, 16],
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
        "vocab_size": 10,
    }
    plain = prefill_flops([5, 5], **sizes)
    mixed = prefill_flops([5, 5], **sizes, mixer_weights=[256, 1000])
    of_heads = 4 * 8 * 8  # query, key, value and output of 2 heads of 4
    assert mixed - plain == 2 * 5 * (256 + 1000 - 2 * of_heads)
