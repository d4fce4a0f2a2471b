"""Runs the decoder layers before the first pruning once for a batch, and not once for each setting.

Whatever is pruned later, these layers compute the same from the same batch. So their results
(hidden states, keys and values, and the recorded attention) are kept and given again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from atp_patch.patching.api import require_patch
from atp_patch.seam import Recorder, Recording, cache_in


@dataclass
class _Computed:
    """What a layer computed from a batch.

    Attributes:
        hidden: (B, L, D) hidden states.
        key: (B, Hk, L, d) keys.
        value: (B, Hk, L, d) values.
        recording: its attention, where a method scored it.
    """

    hidden: Tensor
    key: Tensor
    value: Tensor
    recording: Recording | None = None


class LayersOnce:
    """Keeps what the first decoder layers of one model computed from batches of plain embeddings.

    Attributes:
        batch: a key of the batch that the model is given next.
    """

    def __init__(self) -> None:
        self.batch: Hashable = None
        self._computed: dict[tuple[Hashable, int], _Computed] = {}

    def forget(self) -> None:
        """Drop all results, because other batches follow."""
        self._computed.clear()

    @contextmanager
    def given_again(self, model: Any, skipped: Container[int]) -> Iterator[None]:
        """Replace the layers before the first pruning by their known results inside this context.

        Nothing is replaced where visual tokens are merged before the decoder, or have rotary
        positions by row and column, because the layers then compute something else; nor where some
        layers keep a state in place of keys, which a result would have to bring back too.

        Args:
            model: a patched model.
            skipped: numbers of layers that are left out anyway.
        """
        patch = require_patch(model)
        config, recorder = patch.config, patch.seam.recorder
        alike = config.before is None and not config.rope_2d and not patch.parts.keeps_state
        layers = model.get_decoder().layers
        first = config.layers[0] if alike else 0
        replaced = [number for number in range(first) if number not in skipped]
        for number in replaced:
            layers[number].forward = partial(self._forward, recorder, number, layers[number])
        try:
            yield
        finally:
            for number in replaced:
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
        cache = cache_in(kwargs)
        original = partial(type(layer).forward, layer, hidden, *args, **kwargs)
        if cache is None or cache.get_seq_length(number):
            made: Tensor = original()
            return made
        name, attention = (self.batch, number), layer.self_attn
        known, scored = self._computed.get(name), recorder.awaits(attention)
        if known is None or (scored and known.recording is None):
            recordings: list[Recording] = []
            if scored:
                recorder.add_sink(recordings.append)
            made = original()
            cached = cache.layers[number]
            recording = recordings[0] if recordings else None
            self._computed[name] = _Computed(made, cached.keys, cached.values, recording)
            return made
        if scored:
            assert known.recording is not None
            recorder.replay(known.recording)
        cache.update(known.key, known.value, number)
        return known.hidden
