"""Nothing waits for the device: on meta tensors, which have no values to read, all of it runs."""

from __future__ import annotations

import pytest
import torch

from atp_patch import maths

B, H, HK, V, T, K, D = 2, 4, 2, 6, 3, 11, 8


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def bools(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.bool)


def longs(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_read_no_value(dtype: torch.dtype) -> None:
    visual, key = meta(B, H, V, D, dtype=dtype), meta(B, HK, K, D, dtype=dtype)
    for causal in (False, True):
        got = maths.self_scores(visual, key[:, :, :V], bools(B, V), 0.3, causal=causal)
        assert (got.shape, got.dtype) == ((B, V), torch.float32)
    for mask in (None, bools(B, 1, T, K), meta(B, 1, T, K, dtype=dtype)):
        for renormalise in (False, True):
            got = maths.cross_scores(
                meta(B, H, T, D, dtype=dtype),
                key,
                bools(B, T),
                longs(B, V),
                bools(B, V),
                0.3,
                mask=mask,
                renormalise=renormalise,
                chunk_rows=2,
            )
            assert (got.shape, got.dtype) == ((B, V), torch.float32)
    for norm in ("rank", "minmax", "none"):
        got = maths.redundant_scores(meta(B, V), meta(B, V), bools(B, V), score="mean", norm=norm)
        assert (got.shape, got.dtype) == ((B, V), torch.float32)


def test_decisions_read_no_value() -> None:
    scores = (meta(B, V), meta(B, V))
    thetas = maths.budget_thresholds(*scores, bools(B, V), longs(B), 0.25)
    assert [theta.shape for theta in thetas] == [(B,), (B,)]
    assert maths.hard_keep(*scores, *thetas, bools(B, V)).dtype == torch.bool
    assert maths.soft_mask(*scores, *thetas, bools(B, V), 30.0).shape == (B, V)
    assert maths.straight_through_mask(*scores, *thetas, bools(B, V), 30.0).shape == (B, V)
    assert maths.top_k_mask(scores[0], bools(B, V), longs(B)).dtype == torch.bool


def test_indices_read_no_value_when_the_length_is_given() -> None:
    index, valid = maths.pack(bools(B, V), 4)
    assert (index.shape, valid.shape) == ((B, 4), (B, 4))
    assert maths.gather_tokens(meta(1, V, 3), index).shape == (B, 4, 3)
    assert maths.gather_heads(meta(B, H, V, D), index).shape == (B, H, 4, D)
    assert maths.scatter_tokens(meta(B, 4, 3), index, valid, V).shape == (B, V, 3)
    assert maths.local_index(index, valid, V).shape == (B, V)
    with pytest.raises(RuntimeError, match="meta"):
        maths.pack(bools(B, V))  # counts the longest row, as its docstring says
