"""Cache layers that remember which positions of the prompt they hold.

The choice of tokens is kept with the cache: a pruned layer stores the position of each of its
prompt's keys. Whatever reorders, repeats, selects or crops the cache does the same to these
positions, so that beams, several sequences of one prompt, and caches that are used in turn stay
right.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from atp_patch.contract.errors import CacheError
from atp_patch.maths import scatter_tokens

# The name of the cache as an argument: past_key_values until transformers 5.23, cache from 5.24 on.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def cache_in(values: Mapping[str, Any]) -> Cache | None:
    """Return the cache among the arguments or the outputs of a forward pass, or None.

    Newer versions of transformers take both of its names, and so does this.
    """
    cache: Cache | None = values.get("cache")
    return values.get("past_key_values") if cache is None else cache


class PrunedKeys:
    """Mixin of the cache layers below, which hold ``n`` keys of a pruned prompt, then all others.

    Attributes:
        positions: (B, n) int64 logical positions of the first ``n`` keys; None where nothing is
            pruned.
        valid: (B, n) bool, or None where every slot holds a token (no ragged batch).
        covered: how many logical positions the ``n`` keys stand for. Key ``n + j`` has the logical
            position ``covered + j``.
        pruned: whether ``positions`` are known. A compiled step asks this, because it would be
            compiled anew for other numbers of positions if it looked at them.
    """

    _layer_type = None
    positions: Tensor | None = None
    valid: Tensor | None = None
    covered: int = 0
    pruned: bool = False
    _announced: bool = False

    def prune(self, positions: Tensor, valid: Tensor | None, covered: int) -> None:
        """Set the positions of all keys that the layer holds after its next update; allow that."""
        self.hold(positions, valid, covered)
        self.announce_update()

    def hold(self, positions: Tensor, valid: Tensor | None, covered: int) -> None:
        """Set the logical positions of the keys that the layer holds."""
        self.positions, self.valid, self.covered = positions, valid, covered
        self.pruned = True

    def announce_update(self) -> None:
        """Allow the next update, because its pass narrows its mask to the keys of this layer."""
        self._announced = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store further keys and values, and return all.

        Raises:
            CacheError: where the update was not announced, because a model without a patch would
                read the keys at positions other than their own.
        """
        if self.pruned and not self._announced:
            raise CacheError(
                "this cache holds a prompt whose visual tokens were pruned, and the model that "
                "goes on with it is not patched, so it would take the remaining keys for others. "
                "Go on with the patched model (within atp_patch.disabled(model) too), or begin "
                "with an empty cache and the whole prompt."
            )
        self._announced = False
        found: tuple[Tensor, Tensor] = super().update(*args, **kwargs)  # type: ignore[misc]
        return found

    @property
    def capacity(self) -> int | None:
        """How many slots a preallocated layer has; None for a layer that grows."""
        return None

    @property
    def dropped(self) -> int:
        """How many logical positions have no key in this layer."""
        return 0 if self.positions is None else self.covered - self.positions.shape[-1]

    def _crop_prompt(self, length: int) -> None:
        """Drop the end of the prompt, such as guessed tokens, where none of it was pruned."""
        assert self.positions is not None
        removed = self.covered - length
        whole = torch.arange(length, self.covered, device=self.positions.device)
        tail = self.positions[:, -removed:]
        if self.valid is not None or removed > tail.shape[1] or not bool((tail == whole).all()):
            raise CacheError(
                f"cannot crop the cache to {length} tokens, because tokens of the part that "
                "would be dropped are pruned; start from a copy of the cache (copy.deepcopy) that "
                "was made before the prompt."
            )
        self.hold(self.positions[:, :-removed], None, length)

    def _select(self, rows: Tensor) -> None:
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))
        if self.valid is not None:
            self.valid = self.valid.index_select(0, rows.to(self.valid.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples, as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def reset(self) -> None:
        """Empty the layer, which then holds nothing pruned."""
        super().reset()  # type: ignore[misc]
        self.positions, self.valid, self.covered, self.pruned = None, None, 0, False


class PrunedDynamicLayer(PrunedKeys, DynamicLayer):
    """A growing cache layer whose lengths, as the host reads them, are those of the whole sequence.

    It keeps every key, even where the host's layer would drop those outside of a sliding window.
    The mask says which keys are visible, by their logical positions.
    """

    keys: Any
    values: Any

    def get_seq_length(self) -> int:
        """Return the logical length, which counts all positions so far, pruned ones included."""
        stored = super().get_seq_length()
        return stored + self.dropped if stored else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the mask that the host builds for ``query_length`` new
        tokens.
        """
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens: ``-n`` removes n tokens, and ``n`` keeps a length of n."""
        length = self.get_seq_length()
        remove = length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if remove <= 0 or not self.is_initialized:
            return
        if length - remove < self.covered:
            self._crop_prompt(length - remove)
        self.keys = self.keys[..., :-remove, :]
        self.values = self.values[..., :-remove, :]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], device=self.positions.device)
            self._select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the samples ``indices`` (int64, or bool over the batch)."""
        super().batch_select_indices(indices)
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], device=self.positions.device)
            self._select(rows[indices.to(rows.device)])


class PrunedStaticLayer(PrunedKeys, StaticLayer):
    """A preallocated cache layer whose first ``n`` slots hold the survivors of the prompt.

    What a compiled step reads has the same shape for every prompt, and no number that a graph would
    hold as a constant.

    Attributes:
        slots: (B, capacity) int64, the logical position of each slot.
        slots_valid: (B, capacity) bool, or None where every slot holds a token or is empty.
        skipped: () int64, how many logical positions have no key.
    """

    slots: Tensor
    slots_valid: Tensor | None
    skipped: Tensor

    def hold(self, positions: Tensor, valid: Tensor | None, covered: int) -> None:
        """Set the logical positions of the keys that the layer holds."""
        super().hold(positions, valid, covered)
        self.slots, self.slots_valid = columns(self, self.capacity)
        self.skipped = torch.tensor(self.dropped, device=positions.device)

    def _select(self, rows: Tensor) -> None:
        super()._select(rows)
        if self.positions is not None:
            self.hold(self.positions, self.valid, self.covered)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens: ``-n`` removes n tokens. Layers can do this from transformers
        5.24 on.
        """
        if self.pruned and self.is_initialized and tokens_to_remove < 0:
            length = int(self.get_seq_length()) + tokens_to_remove
            if length < self.covered:
                self._crop_prompt(length)
        super().crop(tokens_to_remove)

    @property
    def capacity(self) -> int:
        """How many slots were allocated."""
        return int(self.max_cache_len)

    def get_seq_length(self) -> Any:
        """Return the logical length, which counts all positions so far, pruned ones included."""
        if not self.is_initialized:
            return 0
        return self.cumulative_length + self.skipped if self.pruned else self.cumulative_length


PrunedLayer = PrunedDynamicLayer | PrunedStaticLayer
_REPLACEABLE = {
    DynamicLayer: PrunedDynamicLayer,
    DynamicSlidingWindowLayer: PrunedDynamicLayer,
    StaticLayer: PrunedStaticLayer,
}


def pruned_layer(cache: Cache | None, layer_idx: int) -> PrunedLayer | None:
    """Return the cache's layer where it holds a pruned prompt, else None, in constant time.

    Gradient checkpointing leaves the layer of a pruned prompt empty.
    """
    if cache is None or not 0 <= layer_idx < len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if isinstance(layer, PrunedKeys) and layer.pruned and layer.is_initialized:  # type: ignore[attr-defined]
        return layer  # type: ignore[return-value]
    return None


def adopt(cache: Cache, layer_idx: int) -> PrunedLayer:
    """Replace a layer of the cache by one that can hold a pruned prompt, with the same content.

    Raises:
        CacheError: for layers that cannot, such as quantised ones and static sliding windows.
    """
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, PrunedKeys):
        return layer  # type: ignore[return-value]
    replacement = _REPLACEABLE.get(type(layer))
    if replacement is None:
        raise CacheError(
            f"a cache with layers of type {type(layer).__name__} cannot hold a pruned prompt; "
            "use a DynamicCache, as generate does by default, or a StaticCache without sliding "
            "windows."
        )
    if layer.is_sliding and layer.cumulative_length >= layer.sliding_window:
        raise CacheError(
            "a cache that has already slid past its window cannot take an image that is to be "
            "pruned; put the image into the first turn, or use atp_patch.disabled(model) for "
            "this turn."
        )
    pruned: Any = replacement.__new__(replacement)
    pruned.__dict__.update(layer.__dict__)
    # The host tells hybrid caches apart by this attribute, so the instance keeps the host's value.
    pruned.is_sliding = layer.is_sliding
    cache.layers[layer_idx] = pruned
    return pruned


def capacity(cache: Cache | None, layer_idx: int = 0) -> int | None:
    """Return how many slots a preallocated layer has, the host's own included, or None for one that
    grows.
    """
    layers = [] if cache is None else cache.layers
    layer: Any = layers[layer_idx] if layer_idx < len(layers) else None
    if isinstance(layer, PrunedKeys):
        return layer.capacity
    return int(layer.max_cache_len) if isinstance(layer, StaticLayer) else None


def check_prunable_again(cache: Cache, layer_idx: int = 0) -> None:
    """Raise CacheError where a filled layer has no room to be pruned a second time."""
    if capacity(cache, layer_idx) is not None:
        raise CacheError(
            "an image in a later turn cannot be pruned into a StaticCache; use a DynamicCache for "
            "conversations with several images."
        )


def check_cache(cache: Cache | None, first_layer: int | None) -> None:
    """Raise CacheError before anything runs where the cache cannot hold a pruned prompt.

    Args:
        cache: the cache, or None.
        first_layer: the first layer whose keys become fewer, or None.
    """
    if cache is not None and first_layer is not None and len(cache.layers) > first_layer:
        layer = cache.layers[first_layer]
        if not isinstance(layer, PrunedKeys) and type(layer) not in _REPLACEABLE:
            adopt(cache, first_layer)


def stored_positions(
    cache: Cache, layer_idx: int, batch: int
) -> tuple[Tensor, Tensor | None] | None:
    """Return the logical positions of the keys that a layer holds already, or None where it is
    empty.

    Returns:
        (B, P) int64, and (B, P) bool or None where every key is a token.

    Raises:
        CacheError: for a filled StaticCache, whose layers have no room to be pruned a second time.
    """
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if layer is None or not layer.is_initialized or layer.keys is None:
        return None
    if not layer.get_seq_length():
        return None
    check_prunable_again(cache, layer_idx)
    stored = layer.keys.shape[-2] if layer.keys.numel() else 0
    if stored == 0:
        return None
    if isinstance(layer, PrunedKeys) and layer.positions is not None:
        return columns(layer, stored)  # type: ignore[arg-type]
    return torch.arange(stored, device=layer.keys.device).expand(batch, -1), None


def columns(layer: PrunedLayer, width: int) -> tuple[Tensor, Tensor | None]:
    """Return the logical position of each key of a layer.

    Args:
        layer: a cache layer that holds a pruned prompt.
        width: how many keys it has.

    Returns:
        (B, width) int64 positions, and (B, width) bool, False where a key is no token, or None
        where every key is a token.
    """
    assert layer.positions is not None
    batch, n = layer.positions.shape
    tail = torch.arange(width - n, device=layer.positions.device) + layer.covered
    positions = torch.cat([layer.positions, tail.expand(batch, -1)], dim=1)
    if layer.valid is None:
        return positions, None
    return positions, torch.cat([layer.valid, layer.valid.new_ones(batch, width - n)], dim=1)


def public_attention(layer: PrunedLayer, weights: Tensor) -> Tensor:
    """Return (B, H, Q, L) attention weights with zeros at pruned keys.

    Args:
        layer: the cache layer whose keys the weights are of, which holds a pruned prompt.
        weights: (B, H, Q, K).
    """
    positions, valid = columns(layer, weights.shape[-1])
    length = layer.get_seq_length() if layer.capacity is None else layer.capacity
    there = positions < length  # the last slots of a preallocated layer stay empty
    if valid is not None:
        there = there & valid
    device = weights.device
    keys = scatter_tokens(
        weights.permute(0, 3, 1, 2), positions.to(device), there.to(device), length
    )
    return keys.permute(0, 2, 3, 1)
