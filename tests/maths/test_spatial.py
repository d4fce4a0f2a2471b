"""Even orders, eq. 5, and the reference grid."""

from __future__ import annotations

import pytest
import torch

from atp_patch.maths import progressive_order, spatial_scores, to_reference_grid

GRIDS = [(1, 1), (1, 7), (5, 3), (6, 6), (24, 24), (17, 30)]


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_the_order_takes_the_farthest_place_each_time(height: int, width: int) -> None:
    turn = progressive_order(height, width).tolist()
    assert sorted(turn) == list(range(height * width))
    place_of = {j: divmod(place, width) for place, j in enumerate(turn)}
    taken = [place_of[0]]
    assert taken == [(height // 2, width // 2)]
    for j in range(1, min(height * width, 40)):
        distances = {
            place: min((place[0] - r) ** 2 + (place[1] - c) ** 2 for r, c in taken)
            for place in place_of.values()
        }
        assert distances[place_of[j]] == max(distances.values()) > 0
        taken.append(place_of[j])


def test_every_beginning_covers_every_part() -> None:
    order = progressive_order(24, 24).reshape(24, 24)
    for count, parts in ((16, 2), (36, 3), (64, 4)):
        taken = (order < count).reshape(parts, 24 // parts, parts, 24 // parts).sum((1, 3))
        assert int(taken.min()) >= 1


def test_progressive_scores_are_equation_5_at_every_rate() -> None:
    scores = spatial_scores(6, 6)
    turn = progressive_order(6, 6)
    for place in range(36):
        rate = (int(turn[place]) + 1) / 36
        assert float(scores[place]) == pytest.approx(min(max(1 - 3 * rate, 0), 1))


def test_strided_scores_take_the_sparsest_grid_that_holds_a_place() -> None:
    scores = spatial_scores(24, 24, order="strided").reshape(24, 24)
    expected = torch.zeros(24, 24)
    for stride in range(2, 25):
        start = ((24 - 1) % stride) // 2
        sampled = [(r, c) for r in range(start, 24, stride) for c in range(start, 24, stride)]
        for place in sampled:
            score = max(1 - 3 * len(sampled) / 576, 0.0)
            expected[place] = max(float(expected[place]), score)
    torch.testing.assert_close(scores, expected)
    assert bool((scores == 1 - 3 * 144 / 576).any())  # on the grid of stride 2 alone: R = 1/4


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="progressive or strided"):
        spatial_scores(4, 4, order="spiral")


def test_one_grid_of_the_reference_size_goes_in_as_it_is() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
    row, column = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0, 1, 0, 0]])
    valid = torch.tensor([[True, True, True, False]])
    size = torch.tensor([[3]])
    got = to_reference_grid(values, torch.zeros(1, 4).long(), row, column, valid, size, size, 3)
    assert got[0].tolist() == [[3, 0, 0], [0, 1, 0], [2, 0, 0]]


def test_grids_of_any_size_are_resampled_and_averaged() -> None:
    # A constant stays that constant at any size; two grids of 1 and 3 average to 2.
    heights, widths = torch.tensor([[2, 5], [4, 0]]), torch.tensor([[3, 4], [4, 0]])
    values = torch.zeros(2, 26)
    values[0, :6], values[0, 6:], values[1, :16] = 1.0, 3.0, 5.0
    grid_id = torch.cat([torch.zeros(2, 6), torch.ones(2, 20)], 1).long()
    grid_id[1] = 0
    row, column = torch.zeros(2, 26).long(), torch.zeros(2, 26).long()
    for b, (start, h, w) in enumerate([(0, 2, 3), (6, 5, 4), (0, 4, 4)]):
        sample = 0 if b < 2 else 1
        for place in range(h * w):
            row[sample, start + place], column[sample, start + place] = divmod(place, w)
    valid = torch.arange(26) < torch.tensor([[26], [16]])
    got = to_reference_grid(values, grid_id, row, column, valid, heights, widths, 6)
    torch.testing.assert_close(got[0], torch.full((6, 6), 2.0))
    torch.testing.assert_close(got[1], torch.full((6, 6), 5.0))


def test_a_sample_without_grids_is_zero() -> None:
    none = torch.zeros(1, 0)
    size = torch.zeros(1, 1).long()
    got = to_reference_grid(none, none.long(), none.long(), none.long(), none.bool(), size, size, 4)
    assert got.tolist() == torch.zeros(1, 4, 4).tolist()
