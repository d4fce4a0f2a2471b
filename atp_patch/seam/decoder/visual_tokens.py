"""The visual tokens that are left before a decoder layer, and the choices among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from atp_patch.contract import Decision, Layout, View
from atp_patch.maths import gather_tokens, pack, scatter_tokens
from atp_patch.seam.decoder.survivors import Survivors


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens that are left of one forward pass.

    Attributes:
        layout: the visual tokens before any pruning.
        token: (B, V) int64, the column of the layout in which each token stands.
        valid: (B, V) bool, False in padding slots.
        left: how many visual tokens each sample has.
    """

    layout: Layout
    token: Tensor
    valid: Tensor
    left: tuple[int, ...]

    @classmethod
    def all_of(cls, layout: Layout) -> VisualTokens:
        """Return all visual tokens of a layout."""
        columns = torch.arange(layout.valid.shape[1], device=layout.valid.device)
        return cls(layout, columns.expand_as(layout.valid), layout.valid, layout.totals)

    @property
    def position(self) -> Tensor:
        """(B, V) int64: the tokens' positions in the sequence."""
        return self.layout.position.gather(1, self.token)

    def keeping(self, keep: Tensor, kept: Sequence[int]) -> VisualTokens:
        """Return only those visual tokens that are kept.

        Args:
            keep: (B, V) bool.
            kept: how many are kept of each sample.
        """
        chosen, valid = pack(keep, length=max(kept))
        return VisualTokens(self.layout, self.token.gather(1, chosen), valid, tuple(kept))

    def to(self, device: torch.device) -> VisualTokens:
        """Return the same tokens on another device."""
        layout = self.layout.to(device)
        return VisualTokens(layout, self.token.to(device), self.valid.to(device), self.left)


@dataclass(frozen=True)
class Choice:
    """The choice that was made before one layer.

    Attributes:
        decision: the method's decision about the visual tokens that reached the layer.
        tokens: the visual tokens that reached the layer.
        slot: (B, V) int64, their places among all tokens that reached the layer.
        kept: how many of them each sample keeps.
        survivors: all tokens that are left; None where nothing has been pruned so far.
    """

    decision: Decision
    tokens: VisualTokens
    slot: Tensor
    kept: tuple[int, ...]
    survivors: Survivors | None

    def merged(self, hidden: Tensor) -> Tensor:
        """Return (B, L', D) hidden states of all tokens that reached the layer.

        A token that takes in others has their weighted sum in place of its own state.
        """
        recycled = self.decision.recycled
        if recycled is None:
            return hidden
        slot, column = self.slot.to(hidden.device), recycled.column.to(hidden.device)
        valid, weight = recycled.valid.to(hidden.device), recycled.weight.to(hidden.device)
        made = weight @ gather_tokens(hidden, slot).float()
        place, length = slot.gather(1, column), hidden.shape[1]
        changed = scatter_tokens(valid, place, valid, length)
        table = scatter_tokens(made.to(hidden.dtype), place, valid, length)
        return torch.where(changed[..., None], table, hidden)


@dataclass(frozen=True)
class Learned:
    """What the losses of a forward pass that learns are made of.

    Attributes:
        soft_counts: for each pruning layer (B,) float32, how many tokens are left after it, with
            the gradient of the budget's loss.
        views: pruning layer -> what the method saw there.
    """

    soft_counts: Sequence[Tensor]
    views: dict[int, View]


class TokenState(Protocol):
    """How one forward pass makes its visual tokens fewer, layer by layer.

    Attributes:
        learning: True where decisions need a soft mask, and their scores a gradient.
        visual: the visual tokens that are left.
        attended: (B, L) bool, False at padding; None without padding.
        choices: layer -> the choice that was made before it.
    """

    learning: ClassVar[bool]
    visual: VisualTokens
    attended: Tensor | None
    choices: dict[int, Choice]

    def apply(self, layer: int, decision: Decision) -> None:
        """Carry out a decision before ``layer``."""

    def columns(self, layer: int, position: Tensor) -> Tensor:
        """Return (B, n) int64: the places of positions (B, n) of the sequence among the tokens that
        a layer runs on.
        """

    def gone(self, layer: int) -> Tensor | None:
        """Return (B, L') bool: the tokens that a layer runs on but no score may see, or None
        without any.
        """

    def seen(self, view: View) -> View:
        """Take note of the view of a method, and return it as the method is to see it."""

    def entering(self, layer: int) -> Survivors | None:
        """Return the tokens that a layer runs on, or None where it runs on all.

        The result is the same when gradient checkpointing replays the layer.
        """

    def survivors(self, layer: int) -> Survivors | None:
        """Return the tokens that were chosen before a layer or earlier, or None before the first
        pruning.
        """

    def merged(self, layer: int, hidden: Tensor) -> Tensor:
        """Return (B, L', D) hidden states of all tokens that reached a layer, where those that stay
        have taken in others.
        """

    def narrow_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        """Return (B, L'', D) hidden states that enter a layer, from (B, L', D) of those before
        it.
        """

    def attention_in(self, layer: int, device: torch.device) -> Callable[..., Any] | None:
        """Return the attention that a layer uses, or None for the host's own."""

    def kept(self, layer: int) -> Tensor:
        """Return (B, L) bool: the tokens that are left in ``layer``, in their original positions.

        The result is False at padding.
        """

    def without_output(self) -> Tensor | None:
        """Return (B, L) bool: the places that have no output of their own, or None where all have
        one.
        """

    def learned(self) -> Learned | None:
        """Return what losses are made of, or None where nothing is learned."""

    def move_to(self, device: torch.device) -> None:
        """Move the state to the device on which the decoder goes on."""


def kept_in(state: TokenState, layer: int) -> Tensor:
    """Compute what :meth:`TokenState.kept` returns from the survivors."""
    layout, survivors = state.visual.layout, state.survivors(layer)
    if survivors is not None:
        return survivors.mask(layout.length)
    if state.attended is not None:
        return state.attended
    position = layout.position
    return position.new_ones(position.shape[0], layout.length, dtype=torch.bool)


def survivors_of(choices: dict[int, Choice], layer: int) -> Survivors | None:
    """Compute what :meth:`TokenState.survivors` returns from the choices."""
    made = [number for number in choices if number <= layer]
    return choices[max(made)].survivors if made else None
