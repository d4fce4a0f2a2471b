"""Forward passes without images on a cache that holds a pruned prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from atp_patch.seam.host.cache import pruned_layer, public_attention
from atp_patch.seam.host.masks import decode_mask


class Decode:
    """One forward pass without images on a cache that holds a pruned prompt.

    Args:
        cache: the cache.
        flash: whether masks are 2D.
        key_layers: for each layer the number of the layer whose keys it attends to.
        attending: the layers that attend, whose attention weights the output may hold.
    """

    def __init__(
        self, cache: Cache, flash: bool, key_layers: Sequence[int], attending: Sequence[int]
    ) -> None:
        self.cache, self.flash = cache, flash
        self.key_layers, self.attending = key_layers, attending
        self._masks: dict[Any, Any] = {}

    def before_layer(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Return the layer's arguments, and change its keywords in place."""
        self.narrow_kwargs(layer, args[0].shape[-2], kwargs)
        return args

    def finish(self, output: Any, kwargs: dict[str, Any], num_layers: int) -> Any:
        """Return the output with zeros in attention weights at pruned keys, or None where it holds
        no attention weights.
        """
        maps = getattr(output, "attentions", None)
        if maps is None:
            return None
        held = [pruned_layer(self.cache, self.key_layers[layer]) for layer in self.attending]
        output.attentions = tuple(
            weights if layer is None else public_attention(layer, weights)
            for layer, weights in zip(held, maps, strict=True)
        )
        return output

    def without_output(self) -> Tensor | None:
        """Return None, since every place has an output."""
        return None

    def losses(self, output: Any) -> dict[str, tuple[float, Tensor]]:
        """Return no losses, since nothing is learned here."""
        return {}

    def narrow_kwargs(self, layer: int, length: int, kwargs: dict[str, Any]) -> None:
        """Give a layer the mask of the keys that it holds, in place.

        Args:
            layer: the number of the layer.
            length: how many tokens the layer runs on.
            kwargs: the layer's arguments.
        """
        makes_keys = self.key_layers[layer] == layer
        held = pruned_layer(self.cache, self.key_layers[layer])
        mask = kwargs.get("attention_mask")
        if held is not None and makes_keys:
            held.announce_update()
        if not makes_keys:  # the keys of this pass are in the cache already
            length = 0
        if held is None or (mask is None and held.valid is None):
            return
        # Ids of objects as keys would force a recompilation at every step.
        if torch.compiler.is_compiling():
            kwargs["attention_mask"] = decode_mask(mask, held, length, flash=self.flash)
            return
        # Layers that were pruned together share their positions, and so their mask.
        key = (id(mask), id(held.positions))
        if key not in self._masks:
            made = decode_mask(mask, held, length, flash=self.flash)
            self._masks[key] = (mask, held.positions, made)
        kwargs["attention_mask"] = self._masks[key][2]
