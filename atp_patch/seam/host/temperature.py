"""Queries that a decoder scales by their positions (Llama 4's layers without rotary embedding).

Its attention counts the positions itself, from the number of tokens that the layer runs on. Where
tokens are gone, that count is too low for those behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

QUERY_FACTOR = "atp_patch_query_factor"


def query_factor(
    attention: Any, positions: Tensor, cache: Cache | None, total: int
) -> Tensor | None:
    """Return (B, n) float32, the factor that gives each query its own position's scale.

    The result is None where the attention scales no queries, or has the same scale for all of them.

    Args:
        attention: the attention module of a decoder layer.
        positions: (B, n) int64, the positions of the tokens that the layer runs on.
        cache: the cache, as the attention is about to find it.
        total: how many positions there are.
    """
    if not getattr(attention, "attn_temperature_tuning", False) or attention.use_rope:
        return None
    if total < attention.floor_scale:
        return None
    before = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
    counted = torch.arange(positions.shape[1], device=positions.device) + before

    def scale(position: Tensor) -> Tensor:
        steps = torch.floor((position.float() + 1.0) / attention.floor_scale)
        return torch.log1p(steps) * attention.attn_scale + 1.0

    return scale(positions) / scale(counted)
