"""Forward passes without images on a cache that holds a pruned prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from atp_patch.seam.host.cache import pruned_layer
from atp_patch.seam.host.masks import decode_mask


class Decode:
    """One forward pass without images on a cache that holds a pruned prompt."""

    def __init__(self, cache: Cache, flash: bool) -> None:
        self.cache, self.flash = cache, flash
        self._masks: dict[Any, Any] = {}

    def narrow_kwargs(self, layer: int, length: int, kwargs: dict[str, Any]) -> None:
        """Give a layer the mask of the keys it holds (in place)."""
        held = pruned_layer(self.cache, layer)
        mask = kwargs.get("attention_mask")
        if held is None or (mask is None and held.valid is None):
            return
        if torch.compiler.is_compiling():  # object identities would force a recompilation a step
            kwargs["attention_mask"] = decode_mask(mask, held, length, flash=self.flash)
            return
        # Layers that were pruned together share their positions, and so the mask.
        key = (id(mask), id(held.positions))
        if key not in self._masks:
            made = decode_mask(mask, held, length, flash=self.flash)
            self._masks[key] = (mask, held.positions, made)
        kwargs["attention_mask"] = self._masks[key][2]
