"""What the host brings to one forward pass with images, narrowed to survivors for its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from atp_patch.contract.errors import CacheError
from atp_patch.maths import gather_tokens
from atp_patch.seam.decoder.survivors import Survivors
from atp_patch.seam.host.cache import (
    PrunedLayer,
    adopt,
    cache_in,
    capacity,
    pruned_layer,
    stored_positions,
)
from atp_patch.seam.host.masks import causal_mask, gather_columns, is_flash, prefill_mask
from atp_patch.seam.host.temperature import query_factor

#: Keywords of a decoder layer that hold a row or a value for each of its tokens, (B, L, *): the
#: inputs that Gemma 4 gives each layer, and the kinds by which ERNIE 4.5 VL chooses experts.
PER_TOKEN = ("per_layer_input", "moe_mm_token_type_ids")


@dataclass(frozen=True)
class HostPass:
    """The host's side of one forward pass.

    Attributes:
        cache: the key/value cache, or None.
        past: how many tokens of earlier turns the cache holds.
        total: how many tokens there are with those of this pass.
        implementation: the decoder's attention implementation.
        plain_mask: True where the host's wide masks say no more than causality and padding.
        sliding_window: a function from a layer to its window in tokens, or to None where the layer
            attends to everything before.
        key_layers: for each layer the number of the layer whose keys it attends to.
        attending: the layers that attend. The others keep a state in place of keys, and their mask
            is (B, L).
    """

    cache: Cache | None
    past: int
    total: int
    implementation: str
    plain_mask: bool
    sliding_window: Callable[[int], int | None]
    key_layers: Sequence[int]
    attending: tuple[int, ...]

    @property
    def flash(self) -> bool:
        """Whether masks are 2D, and positions would be searched for packed sequences."""
        return is_flash(self.implementation)

    def earlier_keys(self, layer: int, new: int) -> int:
        """Return how many keys of earlier turns a layer's cache holds beside ``new`` keys of this
        pass.
        """
        if self.past == 0 or self.cache is None:
            return 0
        return int(self.cache.layers[layer].keys.shape[-2]) - new

    def held(self, layer: int) -> PrunedLayer | None:
        """Return the cache layer whose keys a layer attends to, where it holds a pruned prompt."""
        return pruned_layer(self.cache, self.key_layers[layer])

    def narrow_kwargs(self, layer: int, survivors: Survivors, kwargs: dict[str, Any]) -> None:
        """Narrow what a layer is given for the whole sequence to its survivors, in place.

        What several layers share is narrowed once.
        """

        def gather(table: Tensor, plain: int = 3) -> Tensor:
            if table.ndim > plain:  # one table each for t, h and w
                return torch.stack([gather(part, plain) for part in table])
            return gather_tokens(table, survivors.index.to(table.device))

        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = survivors.once(
                id(tables),
                tables,
                lambda: (
                    gather(tables)  # of complex numbers
                    if isinstance(tables, Tensor)
                    else tuple(gather(table) for table in tables)
                ),
            )
        for name in PER_TOKEN:
            if kwargs.get(name) is not None:
                kwargs[name] = gather(kwargs[name])
        positions = kwargs.get("position_ids")
        if positions is not None:
            # Gaps in the positions would look like packed sequences to flash attention.
            kwargs["position_ids"] = (
                None
                if self.flash
                else survivors.once(id(positions), positions, lambda: gather(positions, 2))
            )
        mask = kwargs.get("attention_mask")
        if layer not in self.attending:
            kwargs["attention_mask"] = self._state_mask(survivors)
            return
        self._check_window(layer)
        # Layers that hold different earlier turns need different columns.
        held = self._held_positions(layer)
        kwargs["attention_mask"] = survivors.once(
            ("mask", id(mask), id(held)), (mask, held), lambda: self._mask(layer, survivors, mask)
        )
        cache = cache_in(kwargs)
        if cache is not None and self.key_layers[layer] == layer:
            keys, valid = self._key_positions(layer, survivors)
            adopt(cache, layer).prune(keys, valid, self.total)

    def query_factor(self, attention: Any, survivors: Survivors, cache: Any) -> Tensor | None:
        """Return (B, n), the factors of the queries of a layer's survivors, or None where all are
        1.

        Args:
            attention: the layer's attention.
            survivors: the tokens that the layer runs on.
            cache: the layer's cache, which has been narrowed, or None.
        """
        return query_factor(attention, survivors.index + self.past, cache, self.total)

    def narrow_columns(self, layer: int, survivors: Survivors, kwargs: dict[str, Any]) -> None:
        """Narrow the mask of a layer to the keys that it attends to, in place.

        This is for a layer whose rows the host has chosen itself, together with what belongs to
        them.
        """
        mask = kwargs.get("attention_mask")

        def narrowed() -> Tensor | None:
            keys, valid = self._key_positions(layer, survivors)
            if mask is not None:
                return gather_columns(mask, keys - self._offset(mask), valid)
            return None if valid is None else valid[:, None, None, :]

        held = self._held_positions(layer)
        key = ("columns", id(mask), id(held))
        kwargs["attention_mask"] = survivors.once(key, (mask, held), narrowed)

    def _offset(self, mask: Tensor) -> int:
        """Return the logical position of a mask's first column."""
        return max(self.total - int(mask.shape[-1]), 0)

    def _held_positions(self, layer: int) -> Tensor | None:
        """Return the positions of earlier turns that a layer's keys stand for, or None where none
        is known.

        It is used as an identity alone.
        """
        if self.cache is None or not self.past:
            return None
        return getattr(self.cache.layers[self.key_layers[layer]], "positions", None)

    def _state_mask(self, survivors: Survivors) -> Tensor | None:
        """Return (B, n) bool, the tokens that enter a layer that keeps a state, or None where all
        slots do.

        The layer zeroes the others, which stand before a sample's tokens, so that its state is
        still empty when the first token comes.

        Raises:
            CacheError: where they would come between the tokens of two turns.
        """
        if survivors.valid is not None and self.past:
            raise CacheError(
                "the samples of this batch keep different numbers of tokens in a later turn, and "
                "this model has layers with a recurrent or convolution state, into which padding "
                "between two turns would go; go on with one sample a batch, put the images into "
                "the first turn, or use atp_patch.disabled(model) for this turn."
            )
        return survivors.valid

    def _slides(self, layer: int) -> bool:
        window = self.sliding_window(layer)
        return window is not None and self.total > window

    def _check_window(self, layer: int) -> None:
        if self.flash and self._slides(layer):
            window = self.sliding_window(layer)
            raise CacheError(
                f"{self.total} tokens do not fit the sliding window of {window} under flash "
                f"attention, which measures it in stored keys; call "
                "model.set_attn_implementation('sdpa')."
            )

    def _mask(self, layer: int, survivors: Survivors, mask: Tensor | None) -> Tensor | None:
        """Return the survivors' mask, or None where causality suffices."""
        if mask is None and survivors.causality_hides_padding:
            return None
        keys, valid = self._key_positions(layer, survivors)
        if mask is None:
            return causal_mask(survivors.index + self.past, keys, valid, flat=self.flash)
        if capacity(self.cache, self.key_layers[layer]) is not None:
            # A static cache is as wide as its mask, and its free slots are hidden.
            free = int(mask.shape[-1]) - keys.shape[1]
            keys = pad(keys, (0, free), value=-1)
            valid = None if valid is None else pad(valid, (0, free), value=False)
        causal_by_itself = self.implementation == "sdpa" or self.flash
        device = mask.device
        return prefill_mask(
            mask,
            survivors.index.to(device),
            keys.to(device),
            None if valid is None else valid.to(device),
            total=self.total,
            causal_suffices=(
                self.plain_mask
                and causal_by_itself
                and not self.past
                and not self._slides(layer)
                and survivors.causality_hides_padding
            ),
        )

    def _key_positions(self, layer: int, survivors: Survivors) -> tuple[Tensor, Tensor | None]:
        """Return (B, K) int64 logical positions of a layer's keys once the survivors are cached.

        The second tensor is (B, K) bool, or None where every key is a token.
        """
        keys, valid = survivors.index + self.past, survivors.valid
        if self.cache is None or not self.past:
            return keys, valid
        if self.key_layers[layer] != layer:  # the layer that made the keys has cached them
            held: Any = self.cache.layers[self.key_layers[layer]]
            return held.positions.to(keys.device), held.valid
        earlier = stored_positions(self.cache, layer, keys.shape[0])
        if earlier is None:
            return keys, valid
        before, before_valid = earlier[0].to(keys.device), earlier[1]
        if before_valid is not None or valid is not None:
            if before_valid is None:
                before_valid = torch.ones_like(before, dtype=torch.bool)
            valid = torch.cat([before_valid.to(keys.device), survivors.all_valid], dim=1)
        return torch.cat([before, keys], dim=1), valid
