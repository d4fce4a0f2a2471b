"""Kinds of key/value caches that need something of their own to be tried."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer


class Quantized(QuantizedLayer):
    """A quantized cache layer that needs no quantisation library and loses nothing."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, tensor: Tensor) -> Tensor:
        return tensor


def quantized_cache(model: Any) -> DynamicCache:
    """An empty cache for the model whose keys and values are quantized in every layer that has
    them.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    keyed = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [Quantized() if type(one) in keyed else one for one in cache.layers]
    return cache
