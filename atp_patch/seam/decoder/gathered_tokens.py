"""Pruning by gathering, where layers run on the tokens that are left and on no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from atp_patch.contract import Decision, Layout, View
from atp_patch.maths import gather_tokens, pack
from atp_patch.seam.decoder.survivors import Survivors
from atp_patch.seam.decoder.visual_tokens import (
    Choice,
    Learned,
    VisualTokens,
    kept_in,
    survivors_of,
)


class GatheredTokens:
    """The token state of a forward pass at inference.

    Args:
        layout: where the visual tokens lie.
        attended: (B, L) bool, False at padding; None without padding.
        token_counts: how many tokens each sample has without padding.
        padding_first: padding slots stand before the tokens of a shorter sample. A layer that keeps
            a state needs that, because what enters it last is what the state holds.
    """

    learning: ClassVar[bool] = False

    def __init__(
        self,
        layout: Layout,
        attended: Tensor | None,
        token_counts: Sequence[int],
        *,
        padding_first: bool = False,
    ) -> None:
        self.visual, self.attended = VisualTokens.all_of(layout), attended
        self._padding_first = padding_first
        self.choices: dict[int, Choice] = {}
        self._latest: Survivors | None = None
        self._token_counts = list(token_counts)

    def apply(self, layer: int, decision: Decision) -> None:
        """Drop the tokens that the decision does not keep, if there are any."""
        tokens = self.visual
        keep = decision.keep.to(tokens.valid.device) & tokens.valid
        kept = tuple(keep.sum(1).tolist())
        slot = self.columns(layer - 1, tokens.position)
        if kept != tokens.left:
            self._drop(keep, kept)
        self.choices[layer] = Choice(decision, tokens, slot, kept, self._latest)

    def _drop(self, keep: Tensor, kept: tuple[int, ...]) -> None:
        tokens, length = self.visual, self.visual.layout.length
        if self._latest is not None:
            alive = self._latest.mask(length)
        elif self.attended is not None:
            alive = self.attended
        else:
            alive = keep.new_ones(keep.shape[0], length)
        # Slots that drop nothing write to an extra last column, which is cut off.
        column = torch.where(tokens.valid & ~keep, tokens.position, length)
        alive = pad(alive, (0, 1)).scatter(1, column, False)[:, :length]
        for b, (before, now) in enumerate(zip(tokens.left, kept, strict=True)):
            self._token_counts[b] -= before - now
        longest = max(self._token_counts)
        index, valid = pack(alive, length=longest)
        ragged = min(self._token_counts) < longest
        # A padding slot repeats the sample's first token, whose finite numbers nothing reads.
        index = torch.where(valid, index, index[:, :1])
        if ragged and self._padding_first:
            gap = (~valid).sum(1, keepdim=True)
            slot = torch.arange(longest, device=index.device) - gap
            index, valid = index.gather(1, slot.clamp(min=0)), slot >= 0
        self._latest = Survivors(index, valid if ragged else None, not self._padding_first)
        self.visual = tokens.keeping(keep, kept)

    def columns(self, layer: int, position: Tensor) -> Tensor:
        """Return the places (B, n) of positions of the sequence among the tokens that a layer runs
        on.
        """
        survivors = self.survivors(layer)
        if survivors is None:
            return position
        slots = survivors.columns(self.visual.layout.length).to(position.device)
        return slots.gather(1, position).clamp(min=0)

    def gone(self, layer: int) -> Tensor | None:
        """Return None, since layers do not run on pruned tokens."""
        return None

    def seen(self, view: View) -> View:
        """Return the view unchanged."""
        return view

    def entering(self, layer: int) -> Survivors | None:
        """Return the tokens that a layer runs on, or None where it runs on all."""
        return survivors_of(self.choices, layer)

    def survivors(self, layer: int) -> Survivors | None:
        """Return the tokens that a layer runs on, or None where it runs on all."""
        return survivors_of(self.choices, layer)

    def merged(self, layer: int, hidden: Tensor) -> Tensor:
        """Return (B, L', D) hidden states of all tokens that reached a layer; some took in
        others.
        """
        choice = self.choices.get(layer)
        return hidden if choice is None else choice.merged(hidden)

    def narrow_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        """Return (B, L'', D) hidden states of a layer's survivors, from (B, L', D) of those before
        it.
        """
        before, after = self.survivors(layer - 1), self.survivors(layer)
        if layer not in self.choices or after is None or after is before:
            return hidden
        index = after.index
        if before is not None:
            slots = before.columns(self.visual.layout.length)
            index = slots.gather(1, index.to(slots.device))
        return gather_tokens(hidden, index.to(hidden.device))

    def attention_in(self, layer: int, device: torch.device) -> Callable[..., Any] | None:
        """Return None, since the host's own attention is used."""
        return None

    def kept(self, layer: int) -> Tensor:
        """Return (B, L) bool: the tokens that enter ``layer``, in their original positions."""
        return kept_in(self, layer)

    def without_output(self) -> Tensor | None:
        """Return (B, L) bool: pruned places, and padding where it was dropped with them."""
        return None if self._latest is None else ~self.kept(max(self.choices))

    def learned(self) -> Learned | None:
        """Return None, since nothing is learned."""
        return None

    def move_to(self, device: torch.device) -> None:
        """Move the state to the device on which the decoder goes on."""
        self.visual = self.visual.to(device)
        if self.attended is not None:
            self.attended = self.attended.to(device)
        if self._latest is not None:
            self._latest = self._latest.to(device)
            last = max(self.choices)
            self.choices[last] = replace(self.choices[last], survivors=self._latest)
