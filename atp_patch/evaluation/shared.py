"""The decoder layers before the first pruning, run once a batch and not once a setting.

Whatever is pruned later on, these layers make the same of the same batch, so that what they left
(hidden states, keys and values, and the recorded attention) is given again: the same bits, sooner.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from atp_patch.patching.patch import require_patch
from atp_patch.seam import Recorder, Recording


@dataclass
class _Left:
    """What a layer left: (B, L, D), (B, Hk, L, d) twice, and its attention where it was scored."""

    hidden: Tensor
    key: Tensor
    value: Tensor
    recording: Recording | None = None


class SharedLayers:
    """What the first decoder layers of one model made of batches of plain embeddings.

    Attributes:
        batch: what names the batch that the model is about to be given.
    """

    def __init__(self) -> None:
        self.batch: Hashable = None
        self._left: dict[tuple[Hashable, int], _Left] = {}

    def forget(self) -> None:
        """Other batches come from now on."""
        self._left.clear()

    @contextmanager
    def given_again(self, model: Any, skipped: Container[int]) -> Iterator[None]:
        """A patched model whose layers before the first pruning are given again where they are
        known; as it is where tokens are merged or turned before those.

        Args:
            skipped: layers that something else stands in for.
        """
        patch = require_patch(model)
        config, recorder = patch.config, patch.seam.recorder
        alike = config.before is None and not config.rope_2d
        layers = model.get_decoder().layers
        first = config.layers[0] if alike else 0
        shared = [number for number in range(first) if number not in skipped]
        for number in shared:
            layers[number].forward = partial(self._forward, recorder, number, layers[number])
        try:
            yield
        finally:
            for number in shared:
                del layers[number].forward

    def _forward(
        self,
        recorder: Recorder,
        number: int,
        layer: Any,
        hidden: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        cache = kwargs.get("past_key_values")
        original = partial(type(layer).forward, layer, hidden, *args, **kwargs)
        if cache is None or cache.get_seq_length(number):
            made: Tensor = original()
            return made
        name, attention = (self.batch, number), layer.self_attn
        left, scored = self._left.get(name), recorder.awaits(attention)
        if left is None or (scored and left.recording is None):
            heard: list[Recording] = []
            if scored:
                recorder.overhear(heard.append)
            made = original()
            held = cache.layers[number]
            self._left[name] = _Left(made, held.keys, held.values, heard[0] if heard else None)
            return made
        if scored:
            assert left.recording is not None
            recorder.replay(left.recording)
        cache.update(left.key, left.value, number)
        return left.hidden
