"""The seam of VoCo tokens: forward passes, and images that are compressed ahead of any question."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from atp_patch.seam.decoder.decode import Decode
from atp_patch.seam.hooks import RUN, Seam
from atp_patch.seam.host.cache import pruned_layer
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.masks import is_flash
from atp_patch.seam.voco.held import following, for_model, prompt_positions
from atp_patch.seam.voco.voco_pass import Compressing, VoCoPass, begin


class VoCoSeam(Seam):
    """As :class:`Seam`, with VoCo tokens instead of pruning layers."""

    pruner: Any

    def __init__(self, parts: Parts, pruner: Compressing) -> None:
        super().__init__(parts, pruner)  # type: ignore[arg-type]

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call, cache = self.thread.call, kwargs.get("past_key_values")
        if self.enabled and call is not None and call.has_images:
            begun = begin(self.parts, self.pruner, call, kwargs)
            if begun is not None:
                run, kwargs = begun
                return args, {**kwargs, RUN: run}
        if cache is not None and pruned_layer(cache, len(cache.layers) - 1):
            flash = is_flash(self.parts.config._attn_implementation)
            return args, {**kwargs, RUN: Decode(cache, flash)}
        return None

    def _after_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        run = kwargs.get(RUN)
        if not isinstance(run, VoCoPass):
            return None
        cache = kwargs.get("past_key_values")
        if cache is None:
            rest = output[1:] if isinstance(output, tuple) else [output.past_key_values]
            cache = next((part for part in rest if isinstance(part, Cache)), None)
        if cache is not None:
            run.evict(cache)
        self.pruner.compressed(run)
        return run.restore(output)

    def compress(
        self, inputs: dict[str, Any], cache: Cache | None, start: Tensor | None
    ) -> tuple[Cache, Tensor]:
        """Read a prompt with images, and keep what text after it will need.

        Args:
            inputs: of the model without its head; the attention mask covers the cache too.
            cache: of earlier segments, with where their positions ended: ``start`` (r, B).

        Returns:
            the cache, and the position (r, B) of the token that follows.
        """
        mask = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :]
        positions = prompt_positions(self.parts.base, inputs, mask)
        if start is not None:
            positions = positions + start[..., None].to(positions)
        cache = DynamicCache() if cache is None else cache
        self.parts.base(
            **inputs,
            position_ids=for_model(positions),
            past_key_values=cache,
            use_cache=True,
        )
        return cache, following(positions, mask)
