"""Prompts that are compressed before any question: what their cache holds, and what follows."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from atp_patch.contract.errors import InputError
from atp_patch.seam.host.cache import CACHE_ARGUMENT, adopt


def for_model(positions: Tensor) -> Tensor:
    """Return positions (r, B, L) as a model takes them, which is (B, L) where there is one row."""
    return positions[0] if len(positions) == 1 else positions


def prompt_positions(base: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """Return (r, B, L) int64: the positions of a prompt as ``generate`` would make them, from 0.

    There is one row where the model counts tokens. Else there are four, of which the first counts
    tokens and the others are (t, h, w).

    Args:
        base: the model without its head.
        inputs: the arguments of the prompt's forward pass.
        mask: (B, L), 0 at padding.
    """
    count = (mask.long().cumsum(-1) - 1).clamp(min=0)[None]
    if not hasattr(base, "get_rope_index"):
        return count
    names = set(inspect.signature(base.get_rope_index).parameters)
    if "mm_token_type_ids" in names - set(inputs):
        raise InputError("pass mm_token_type_ids from the model's processor along.")
    given = {name: inputs[name] for name in names & set(inputs)}
    grid, _ = base.get_rope_index(**{**given, "attention_mask": mask})
    return torch.cat([count.to(grid), grid])


def read_ahead(
    base: Any, inputs: dict[str, Any], cache: Cache | None, start: Tensor | None
) -> tuple[Cache, Tensor]:
    """Run the model over a prompt with images, and keep what text behind it needs.

    Args:
        base: the patched model without its head.
        inputs: the arguments of the forward pass; the attention mask covers the cache too.
        cache: the cache of earlier segments, or None.
        start: (r, B) int64, the position that follows the earlier segments, or None.

    Returns:
        the cache, and (r, B) int64 the position of the token that follows.
    """
    mask = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :]
    positions = prompt_positions(base, inputs, mask)
    if start is not None:
        positions = positions + start[..., None].to(positions)
    cache = DynamicCache() if cache is None else cache
    base(**inputs, position_ids=for_model(positions), use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache, following(positions, mask)


def following(positions: Tensor, mask: Tensor) -> Tensor:
    """Return (r, B) int64: the position that follows the tokens of a prompt.

    Args:
        positions: (r, B, L) int64.
        mask: (B, L), 0 at padding.
    """
    behind = torch.where(mask.bool(), positions, -1).amax(-1) + 1
    if len(behind) == 1:
        return behind
    return torch.cat([behind[:1], behind[1:].amax(0, keepdim=True).expand(3, -1)])


@dataclass(frozen=True)
class CachedPrompt:
    """What the cache of a compressed prompt holds.

    Attributes:
        keys, values: for each layer (B, Hk, n, d).
        positions: (B, n) int64 logical positions of the keys.
        valid: (B, n) bool, False in the padding slots of shorter samples.
        length: the logical length.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor
    valid: Tensor
    length: int

    @classmethod
    def of(cls, cache: Cache) -> CachedPrompt:
        """Read a cache right after its prompt."""
        layers: Any = cache.layers
        first = layers[0]
        valid = first.valid
        if valid is None:
            valid = torch.ones_like(first.positions, dtype=torch.bool)
        keys, values = (tuple(getattr(x, name) for x in layers) for name in ("keys", "values"))
        return cls(keys, values, first.positions, valid, first.covered)

    def cache(self, repeats: int = 1) -> Cache:
        """Return a new cache that holds the same, with each sample ``repeats`` times."""
        cache = DynamicCache()
        every = bool(self.valid.all())
        for number, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key, value, number)
            valid = None if every else self.valid.to(key.device)
            adopt(cache, number).hold(self.positions.to(key.device), valid, self.length)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return cache
