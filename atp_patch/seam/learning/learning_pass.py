"""A forward pass that learns: full length throughout, pruned keys weighed down instead of
gathered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from atp_patch.contract import Decision, View
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.maths import pack
from atp_patch.seam.decoder.prefill import LayerRecord, Prefill
from atp_patch.seam.decoder.survivors import Survivors
from atp_patch.seam.host.masks import scoring_mask
from atp_patch.seam.host.recorder import Recording


class LearningPass(Prefill):
    """As :class:`Prefill`, with soft masks over keys (METHOD: training attention).

    Attributes:
        weights: pruning layer -> (B, L) float32 of the keys from there on: 1 for text, the product
            of the soft masks so far for visual tokens.
        soft_counts: (B,) float32 tokens left after each pruning layer so far, with the gradient
            that the budget takes.
        views: pruning layer -> what the method saw there, for its losses.
    """

    gathers = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights: dict[int, Tensor] = {}
        self.soft_counts: list[Tensor] = []
        self.views: dict[int, View] = {}
        self._counted: Tensor | None = None
        self._alive: Tensor | None = None

    def weight_in(self, layer: int) -> Tensor | None:
        """Of the keys in a layer, None before the first pruning; the same when it is replayed."""
        done = [number for number in self.weights if number <= layer]
        return self.weights[max(done)].to(self.layout.mask.device) if done else None

    def view(
        self,
        layer: int,
        step: int,
        hidden: Tensor,
        counts: tuple[int, ...] | None,
        **minimum: Any,
    ) -> View:
        """As at inference: what is pruned already is hidden from the scores, and a mask is
        asked.
        """
        recording = self.recording
        if recording is not None and self._alive is not None:
            self.recording = self._without_pruned(recording)
        view = super().view(layer, step, hidden, counts, **minimum)
        self.views[layer] = replace(view, learning=True)
        return self.views[layer]

    def _without_pruned(self, recording: Recording) -> Recording:
        query = recording.query
        mask = scoring_mask(recording.mask, query.shape[2], query.shape[2], query.device)
        assert self._alive is not None
        gone = ~self._alive.to(query.device)[:, None, None, :]
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(gone, hidden)
        return replace(recording, mask=mask)

    def apply(self, layer: int, decision: Decision, counts: tuple[int, ...] | None) -> bool:
        """Weigh down what the decision does not keep; the sequence stays as long as it is."""
        assert decision.soft is not None
        keep = decision.keep & self._token_valid
        kept = keep.sum(1).tolist()
        length = self.layout.length
        position = self.layout.position.gather(1, self._token)
        spare = torch.where(self._token_valid, position, length)
        text = pad(~self.layout.mask, (0, 1)).float()

        def weighed(soft: Tensor, before: Tensor | None) -> Tensor:
            weight = text.scatter(1, spare, soft.float())[:, :length]
            return weight if before is None else before.to(weight.device) * weight

        counted = decision.soft if decision.counted is None else decision.counted
        self.weights[layer] = weighed(decision.soft, self.weight_in(layer))
        self._counted = weighed(counted, self._counted)
        if layer:  # what enters the decoder is no choice of the thresholds
            self.soft_counts.append((self._counted * self.layout.mask).sum(1))
        alive = (self.kept(layer) if self._alive is None else self._alive).to(position.device)
        gone = torch.where(self._token_valid & ~keep, position, length)
        self._alive = pad(alive, (0, 1)).scatter(1, gone, False)[:, :length]
        survivors = Survivors(*pack(self._alive))
        self.records[layer] = LayerRecord(
            decision, self._token, self._token_valid, position, tuple(kept), survivors
        )
        chosen, chosen_valid = pack(keep, length=max(kept))
        self._token, self._token_valid = self._token.gather(1, chosen), chosen_valid
        self._left = kept
        return False


def check_checkpointing(layer: Any) -> None:
    """Raise for reentrant gradient checkpointing, which loses what the thresholds learn from.

    Raises:
        UnsupportedModelError: naming the call that turns it off.
    """
    function = getattr(layer, "_gradient_checkpointing_func", None)
    active = getattr(layer, "gradient_checkpointing", False)
    if active and getattr(function, "keywords", {}).get("use_reentrant", False):
        raise UnsupportedModelError(
            "reentrant gradient checkpointing gives the thresholds wrong gradients; call "
            "model.gradient_checkpointing_enable({'use_reentrant': False})."
        )
