"""Pruning that is learned, where layers run on all tokens and weigh the keys of pruned ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from atp_patch.contract import Decision, Layout, View
from atp_patch.maths import pack
from atp_patch.seam.decoder.survivors import Survivors
from atp_patch.seam.decoder.visual_tokens import (
    Choice,
    Learned,
    VisualTokens,
    kept_in,
    survivors_of,
)
from atp_patch.seam.learning.weighted import weighted_attention


class WeighedTokens:
    """The token state of a forward pass in which thresholds learn.

    Args:
        layout: where the visual tokens lie.
        attended: (B, L) bool, False at padding; None without padding.
    """

    learning: ClassVar[bool] = True

    def __init__(self, layout: Layout, attended: Tensor | None) -> None:
        self.visual, self.attended = VisualTokens.all_of(layout), attended
        self.choices: dict[int, Choice] = {}
        # layer -> (B, L) float32, the weight of each key from that layer on: 1 for text, and for
        # visual tokens the product of the soft masks so far.
        self._weights: dict[int, Tensor] = {}
        self._counted: Tensor | None = None  # equal to the last weight, with the gradient of counts
        self._soft_counts: list[Tensor] = []
        self._views: dict[int, View] = {}
        self._alive: Tensor | None = None  # (B, L) bool, the tokens that are not pruned yet

    def apply(self, layer: int, decision: Decision) -> None:
        """Weigh the tokens by the decision's soft mask; the sequence keeps its length."""
        assert decision.soft is not None
        tokens, length = self.visual, self.visual.layout.length
        keep = decision.keep.to(tokens.valid.device) & tokens.valid
        kept = tuple(keep.sum(1).tolist())
        position = tokens.position
        column = torch.where(tokens.valid, position, length)
        text = pad(~tokens.layout.mask, (0, 1)).float()

        def weighed(soft: Tensor, before: Tensor | None) -> Tensor:
            weight = text.scatter(1, column, soft.float())[:, :length]
            return weight if before is None else before.to(weight.device) * weight

        counted = decision.soft if decision.counted is None else decision.counted
        self._weights[layer] = weighed(decision.soft, self._weight_in(layer))
        self._counted = weighed(counted, self._counted)
        if layer:  # thresholds do not choose what enters the decoder
            self._soft_counts.append((self._counted * tokens.layout.mask).sum(1))
        alive = (self.kept(layer) if self._alive is None else self._alive).to(position.device)
        goes = torch.where(tokens.valid & ~keep, position, length)
        self._alive = pad(alive, (0, 1)).scatter(1, goes, False)[:, :length]
        survivors = Survivors(*pack(self._alive))
        self.choices[layer] = Choice(decision, tokens, position, kept, survivors)
        self.visual = tokens.keeping(keep, kept)

    def columns(self, layer: int, position: Tensor) -> Tensor:
        """Return the positions themselves, since every token keeps its place."""
        return position

    def gone(self, layer: int) -> Tensor | None:
        """Return (B, L) bool: the tokens that are pruned before a layer or earlier, and padding."""
        pruned = any(number <= layer for number in self.choices)
        return ~self.kept(layer) if pruned else None

    def seen(self, view: View) -> View:
        """Return the view with ``learning`` set, and keep it for the losses."""
        self._views[view.layer] = replace(view, learning=True)
        return self._views[view.layer]

    def entering(self, layer: int) -> Survivors | None:
        """Return None, since layers run on all tokens."""
        return None

    def survivors(self, layer: int) -> Survivors | None:
        """Return the tokens that were chosen before a layer or earlier, or None before the first
        pruning.
        """
        return survivors_of(self.choices, layer)

    def merged(self, layer: int, hidden: Tensor) -> Tensor:
        """Return (B, L, D) hidden states of all tokens, where some may have taken in others."""
        choice = self.choices.get(layer)
        return hidden if choice is None else choice.merged(hidden)

    def narrow_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the hidden states unchanged, since every token keeps its place."""
        return hidden

    def attention_in(self, layer: int, device: torch.device) -> Callable[..., Any] | None:
        """Return weighted attention from the first pruning layer on, and None before it."""
        weight = self._weight_in(layer)
        return None if weight is None else partial(weighted_attention, weight=weight.to(device))

    def _weight_in(self, layer: int) -> Tensor | None:
        """Return (B, L) float32: the weights of the keys in a layer, or None before the first
        pruning layer.

        They are the same when gradient checkpointing replays the layer.
        """
        made = [number for number in self._weights if number <= layer]
        return self._weights[max(made)].to(self.visual.layout.mask.device) if made else None

    def kept(self, layer: int) -> Tensor:
        """Return (B, L) bool: the tokens that are left in ``layer``, in their original
        positions.
        """
        return kept_in(self, layer)

    def without_output(self) -> Tensor | None:
        """Return (B, L) bool: the tokens that are pruned in the end, and padding."""
        return ~self.kept(max(self.choices)) if self.choices else None

    def learned(self) -> Learned:
        """Return what the losses are made of."""
        return Learned(self._soft_counts, self._views)

    def move_to(self, device: torch.device) -> None:
        """Move the state to the device on which the decoder goes on."""
        self.visual = self.visual.to(device)
        if self.attended is not None:
            self.attended = self.attended.to(device)
