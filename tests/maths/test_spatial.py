"""Even orders, eq. 5, and the reference grid."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

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


@pytest.fixture
def fresh_orders() -> Iterator[None]:
    """No order in the cache, before and after."""
    progressive_order.cache_clear()
    yield
    progressive_order.cache_clear()


def test_of_equally_far_places_the_least_crowded_is_next() -> None:
    turn = progressive_order(6, 7).tolist()
    place_of = {j: divmod(place, 7) for place, j in enumerate(turn)}

    def square(a: tuple[int, int], b: tuple[int, int]) -> int:
        return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2

    for j in range(1, 42):
        taken = [place_of[i] for i in range(j)]
        left = [place_of[i] for i in range(j, 42)]
        nearest = {a: min(square(a, b) for b in taken) for a in left}
        equals = [a for a in left if nearest[a] == max(nearest.values())]
        crowds = {a: sum(Fraction(1, square(a, b)) for b in taken) for a in equals}
        # Rounding may part places that are exactly equally crowded.
        assert float(crowds[place_of[j]] - min(crowds.values())) < 1e-9


@pytest.mark.parametrize(("height", "width"), [(12, 12), (24, 24), (17, 30)])
def test_every_beginning_is_balanced(height: int, width: int) -> None:
    """No half of the grid gets a tenth of it more than the opposite half, at any count."""
    turn = progressive_order(height, width).reshape(height, width)
    for count in range(1, height * width + 1):
        taken = (turn < count).long()
        halves = [
            (taken[: height // 2].sum(), taken[-(height // 2) :].sum()),
            (taken[:, : width // 2].sum(), taken[:, -(width // 2) :].sum()),
        ]
        for one, other in halves:
            assert abs(int(one) - int(other)) <= max(2, 0.04 * height * width, 0.1 * count)


@pytest.mark.usefixtures("fresh_orders")
def test_an_order_first_made_for_inference_still_serves_training() -> None:
    with torch.inference_mode():
        progressive_order(3, 4)
        assert not progressive_order(3, 4).is_inference()
    values = torch.randn(12, requires_grad=True)
    (values.gather(0, progressive_order(3, 4)) ** 2).sum().backward()
    assert values.grad is not None


@pytest.mark.usefixtures("fresh_orders")
@pytest.mark.parametrize("order", ["progressive", "strided"])
def test_a_default_device_does_not_reach_the_scores(order: str) -> None:
    expected = spatial_scores(5, 4, order=order)
    progressive_order.cache_clear()
    with torch.device("meta"):
        got = spatial_scores(5, 4, order=order)
    assert got.device.type == "cpu"
    assert torch.equal(got, expected)


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


def test_what_stands_in_invalid_slots_stays_out_of_the_grid() -> None:
    values = torch.tensor([[3.0, float("nan"), 2.0, float("inf")]])
    row, column = torch.tensor([[0, 0, 1, 99]]), torch.tensor([[0, 0, 1, 99]])
    grid_id = torch.tensor([[0, 0, 0, 7]])
    valid = torch.tensor([[True, False, True, False]])
    size = torch.tensor([[2]])
    got = to_reference_grid(values, grid_id, row, column, valid, size, size, 2)
    assert got[0].tolist() == [[3, 0], [0, 2]]


def test_a_gradient_flows_back_to_each_value() -> None:
    values = torch.randn(1, 6, requires_grad=True)
    row, column = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    valid = torch.arange(6)[None] < 5
    heights, widths = torch.tensor([[2]]), torch.tensor([[3]])
    zero = torch.zeros_like(row)
    to_reference_grid(values, zero, row, column, valid, heights, widths, 4).sum().backward()
    assert values.grad is not None
    assert bool((values.grad[0, :5] > 0).all())
    assert float(values.grad[0, 5]) == 0.0


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
