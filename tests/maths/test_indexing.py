"""Ragged indices against plain lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_patch.maths import (
    gather_heads,
    gather_tokens,
    local_index,
    pack,
    scatter_tokens,
    top_k_mask,
)

rows = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4
    )
)
every = settings(max_examples=80, deadline=None, derandomize=True)


@every
@given(rows, st.integers(0, 3))
def test_pack_lists_the_true_places(keep: list[list[bool]], extra: int) -> None:
    places = [[i for i, kept in enumerate(row) if kept] for row in keep]
    longest = max(map(len, places))
    for length in (None, longest + extra):
        index, valid = pack(torch.tensor(keep), length)
        assert index.shape == valid.shape == (len(keep), longest if length is None else length)
        for b, expected in enumerate(places):
            assert index[b][valid[b]].tolist() == expected
            assert index[b][~valid[b]].tolist() == [0] * (index.shape[1] - len(expected))


@every
@given(rows)
def test_scattering_undoes_gathering(keep: list[list[bool]]) -> None:
    mask = torch.tensor(keep)
    index, valid = pack(mask)
    length = mask.shape[1]
    x = torch.arange(1.0, 1 + mask.numel() * 2).reshape(*mask.shape, 2)
    back = scatter_tokens(gather_tokens(x, index), index, valid, length, fill=-7.0)
    assert torch.equal(back, torch.where(mask[..., None], x, -7.0))
    slots = local_index(index, valid, length)
    for b in range(len(keep)):
        for place in range(length):
            slot = int(slots[b, place])
            assert (slot >= 0) == keep[b][place]
            if slot >= 0:
                assert int(index[b, slot]) == place


def test_gathering_broadcasts_one_row_and_keeps_heads() -> None:
    index = torch.tensor([[2, 0], [1, 1]])
    table = torch.arange(6.0).reshape(1, 3, 2)
    assert torch.equal(gather_tokens(table, index)[1], table[0, [1, 1]])
    states = torch.randn(2, 3, 4, 5)
    got = gather_heads(states, index)
    assert torch.equal(got[0, 2], states[0, 2, [2, 0]])
    assert torch.equal(got[1, 0], states[1, 0, [1, 1]])


@every
@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(
            st.lists(st.sampled_from([-1.0, 0.0, 0.5, float("-inf")]), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
            st.integers(0, n + 2),
        )
    )
)
def test_top_k_takes_the_best_and_the_earlier_of_equals(
    case: tuple[list[float], list[bool], int],
) -> None:
    scores, valid, count = case
    got = top_k_mask(torch.tensor([scores]), torch.tensor([valid]), torch.tensor([count]))[0]
    order = sorted((i for i, ok in enumerate(valid) if ok), key=lambda i: (-scores[i], i))
    assert torch.nonzero(got)[:, 0].tolist() == sorted(order[:count])
