"""Masks of every attention implementation, narrowed: against a reading of the host's mask by
position.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

import atp_patch
from atp_patch.seam.host.cache import PrunedDynamicLayer, PrunedStaticLayer
from atp_patch.seam.host.masks import (
    check_implementation,
    decode_mask,
    gather_columns,
    prefill_mask,
)

LENGTH = 9
PADDING = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
ROWS = torch.tensor([[0, 1, 4, 7, 8], [2, 3, 8, 2, 2]])
VALID = torch.tensor([[True] * 5, [True, True, True, False, False]])


def wide(kind: str, window: int = LENGTH) -> Tensor:
    """The host's mask of a left-padded batch: (2, 1, L, L)."""
    place = torch.arange(LENGTH)
    near = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - window)
    seen = near[None, None] & PADDING[:, None, None, :]
    return seen if kind == "sdpa" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [3, LENGTH])
def test_prefill_masks_are_the_hosts_by_position(kind: str, window: int) -> None:
    host = wide(kind, window)
    got = prefill_mask(host, ROWS, ROWS, VALID, total=LENGTH, causal_suffices=False)
    assert got is not None
    assert got.dtype == host.dtype
    for b in range(2):
        for i, row in enumerate(ROWS[b]):
            for j, column in enumerate(ROWS[b]):
                expected = bool(visible(host)[b, 0, row, column]) and bool(VALID[b, j])
                assert bool(visible(got)[b, 0, i, j]) == expected


def test_no_mask_where_causality_suffices_or_there_was_none() -> None:
    assert prefill_mask(None, ROWS, ROWS, VALID, total=LENGTH, causal_suffices=False) is None
    assert prefill_mask(wide("sdpa"), ROWS, ROWS, VALID, total=LENGTH, causal_suffices=True) is None


def test_flash_masks_are_columns() -> None:
    host = PADDING.long()
    got = prefill_mask(host, ROWS, ROWS, VALID, total=LENGTH, causal_suffices=False)
    assert got is not None
    assert got.dtype == host.dtype
    assert got.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def held(valid: Tensor | None, new: int, layer: type = PrunedDynamicLayer) -> PrunedDynamicLayer:
    """A cache layer with five prompt slots for nine positions, and ``new`` tokens after them."""
    cached = layer() if layer is PrunedDynamicLayer else layer(max_cache_len=12)
    cached.prune(ROWS, valid, LENGTH)
    states = torch.randn(2, 1, ROWS.shape[1] + new, 4)
    cached.update(states, states)
    return cached


@pytest.mark.parametrize("flash", [False, True])
def test_decoding_needs_no_mask_where_no_slot_is_empty(flash: bool) -> None:
    assert decode_mask(None, held(None, 3), 1, flash=flash) is None


def test_decoding_hides_empty_slots() -> None:
    expected = torch.cat([VALID, torch.ones(2, 4, dtype=torch.bool)], dim=1)
    wide_mask = decode_mask(None, held(VALID, 3), 1, flash=False)
    flat_mask = decode_mask(None, held(VALID, 3), 1, flash=True)
    assert wide_mask is not None
    assert flat_mask is not None
    assert torch.equal(wide_mask[:, 0, 0], expected)
    assert torch.equal(flat_mask, expected)


@pytest.mark.parametrize("width", [LENGTH + 4, 6])
def test_decoding_reads_the_hosts_columns(width: int) -> None:
    """A narrower mask is one of a sliding window: its last column is the newest token."""
    generator = torch.Generator().manual_seed(0)
    host = torch.rand(2, 1, 2, width, generator=generator) < 0.5
    got = decode_mask(host, held(VALID, 2), 2, flash=False)
    assert got is not None
    positions = torch.cat([ROWS, torch.arange(LENGTH, LENGTH + 4).expand(2, -1)], dim=1)
    offset = LENGTH + 4 - width
    for b in range(2):
        for j, position in enumerate(positions[b].tolist()):
            used = j >= ROWS.shape[1] or bool(VALID[b, j])
            column = position - offset
            for i in range(2):
                expected = used and column >= 0 and bool(host[b, 0, i, max(column, 0)])
                assert bool(got[b, 0, i, j]) == expected


def test_a_static_cache_hides_its_free_slots() -> None:
    host = torch.arange(12)[None, None, None, :].expand(2, 1, 1, 12) <= LENGTH
    got = decode_mask(host, held(VALID, 1, PrunedStaticLayer), 1, flash=False)
    assert got is not None
    # Five prompt slots, one decoded token, and the rest of twelve free.
    assert got[0, 0, 0].tolist() == [True] * 6 + [False] * 6
    assert got[1, 0, 0].tolist() == [True, True, True, False, False, True] + [False] * 6


def test_columns_outside_a_mask_are_hidden() -> None:
    got = gather_columns(torch.ones(1, 1, 1, 3, dtype=torch.bool), torch.tensor([[-1, 0, 3]]), None)
    assert got.tolist() == [[[[False, True, False]]]]


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa"])
def test_implementations_that_cannot_be_narrowed_are_refused(name: str) -> None:
    with pytest.raises(atp_patch.UnsupportedModelError, match="set_attn_implementation"):
        check_implementation(name)


def test_pruned_layers_are_no_layer_types_of_the_host() -> None:
    from transformers import cache_utils

    known = {
        *cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values(),
        *cache_utils.STATIC_LAYER_TYPE_MAPPING.values(),
    }
    assert {DynamicLayer, StaticLayer} <= known
    assert not {PrunedDynamicLayer, PrunedStaticLayer} & known


def test_logical_lengths_and_cropping() -> None:
    layer = held(None, 4)
    assert layer.get_seq_length() == LENGTH + 4
    assert layer.get_mask_sizes(2) == (LENGTH + 6, 0)
    layer.crop(-3)
    assert layer.get_seq_length() == LENGTH + 1
    layer.crop(LENGTH)  # an absolute length, as older versions say it
    assert layer.get_seq_length() == LENGTH
    assert layer.keys.shape[-2] == 5
    with pytest.raises(atp_patch.CacheError, match="cannot crop"):
        layer.crop(-2)


def test_samples_are_reordered_repeated_and_selected_with_their_positions() -> None:
    layer = held(VALID, 1)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert layer.keys.shape[0] == 2
    assert torch.equal(layer.positions, ROWS.flip(0))
    assert torch.equal(layer.valid, VALID.flip(0))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.positions is None
