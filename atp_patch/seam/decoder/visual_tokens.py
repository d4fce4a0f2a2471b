"""The visual tokens that are left before a decoder layer, and what was chosen among them."""

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
        token: (B, V) int64: which of the sample's visual tokens each is (a column of the layout).
        valid: (B, V) bool, False in padding slots.
        left: how many each sample has.
    """

    layout: Layout
    token: Tensor
    valid: Tensor
    left: tuple[int, ...]

    @classmethod
    def all_of(cls, layout: Layout) -> VisualTokens:
        """All visual tokens of a layout."""
        columns = torch.arange(layout.valid.shape[1], device=layout.valid.device)
        return cls(layout, columns.expand_as(layout.valid), layout.valid, layout.totals)

    @property
    def position(self) -> Tensor:
        """(B, V) int64 positions in the sequence."""
        return self.layout.position.gather(1, self.token)

    def keeping(self, keep: Tensor, kept: Sequence[int]) -> VisualTokens:
        """Those of them that are kept.

        Args:
            keep: (B, V) bool; ``kept``: how many these are, of each sample.
        """
        chosen, valid = pack(keep, length=max(kept))
        return VisualTokens(self.layout, self.token.gather(1, chosen), valid, tuple(kept))

    def to(self, device: torch.device) -> VisualTokens:
        """The same tokens on another device."""
        layout = self.layout.to(device)
        return VisualTokens(layout, self.token.to(device), self.valid.to(device), self.left)


@dataclass(frozen=True)
class Choice:
    """What was chosen before one layer.

    Attributes:
        decision: about the visual tokens that reached the layer.
        tokens: those visual tokens; ``slot`` (B, V) their places among all tokens that reached it.
        kept: how many of them each sample keeps.
        survivors: all tokens that are left, None where nothing was pruned so far.
    """

    decision: Decision
    tokens: VisualTokens
    slot: Tensor
    kept: tuple[int, ...]
    survivors: Survivors | None

    def merged(self, hidden: Tensor) -> Tensor:
        """(B, L', D) hidden states of all tokens that reached the layer, sums in place of those
        that take in others.
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
        soft_counts: (B,) float32 tokens left after each pruning layer, with the gradient that the
            budget takes.
        views: pruning layer -> what the method saw there.
    """

    soft_counts: Sequence[Tensor]
    views: dict[int, View]


class TokenState(Protocol):
    """How one forward pass makes its visual tokens fewer, layer by layer.

    Attributes:
        learning: decisions need a soft mask, and their scores a gradient.
        visual: the visual tokens that are left.
        attended: (B, L) bool, False at padding; None without padding.
        choices: layer -> what was chosen before it.
    """

    learning: ClassVar[bool]
    visual: VisualTokens
    attended: Tensor | None
    choices: dict[int, Choice]

    def apply(self, layer: int, decision: Decision) -> None:
        """Carry out a decision before ``layer``."""

    def slots(self, position: Tensor) -> Tensor:
        """Places of positions (B, n) of the sequence among the tokens that are left."""

    def gone(self) -> Tensor | None:
        """(B, L') bool: tokens that layers still run on, but no score may see; None: none."""

    def seen(self, view: View) -> View:
        """Take note of what a method is about to see, and give it back as it is to be seen."""

    def entering(self, layer: int) -> Survivors | None:
        """The tokens that a layer runs on; None: all. Known again when the layer is replayed."""

    def survivors(self, layer: int) -> Survivors | None:
        """The tokens that were chosen before a layer or earlier; None before the first pruning."""

    def narrow_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        """(B, L', D) hidden states that would enter a layer -> those that do."""

    def attention_in(self, layer: int, device: torch.device) -> Callable[..., Any] | None:
        """What stands in for the attention of a layer; None: the host's own."""

    def kept(self, layer: int) -> Tensor:
        """(B, L) bool: tokens that are left in ``layer``, in their original positions; padding
        False.
        """

    def without_output(self) -> Tensor | None:
        """(B, L) bool: places that have no output of their own; None where all have one."""

    def learned(self) -> Learned | None:
        """What losses are made of; None where nothing learns."""

    def move_to(self, device: torch.device) -> None:
        """Follow the decoder to another device (a model may span several)."""


def kept_in(state: TokenState, layer: int) -> Tensor:
    """As :meth:`TokenState.kept`, from the survivors."""
    layout, survivors = state.visual.layout, state.survivors(layer)
    if survivors is not None:
        return survivors.mask(layout.length)
    if state.attended is not None:
        return state.attended
    position = layout.position
    return position.new_ones(position.shape[0], layout.length, dtype=torch.bool)


def survivors_of(choices: dict[int, Choice], layer: int) -> Survivors | None:
    """As :meth:`TokenState.survivors`, from the choices."""
    made = [number for number in choices if number <= layer]
    return choices[max(made)].survivors if made else None
