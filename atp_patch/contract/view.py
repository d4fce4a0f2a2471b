"""What a method sees before it decides: at the decoder's door, or before one of its layers.

Shapes: ``B`` batch, ``L`` sequence, ``V`` visual tokens (packed, padded to the longest sample),
``T`` text rows, ``H`` heads, ``Hk`` key/value heads, ``K`` keys, ``d`` head size, ``D`` hidden
size, ``V0`` visual tokens before any pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.errors import ConfigError
from atp_patch.contract.layout import Layout
from atp_patch.contract.mask import AttentionMask
from atp_patch.contract.tower import TowerTokens


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """What every method that returns a ``Decision`` sees of the visual tokens that are left.

    Attributes:
        layout: the visual tokens before any pruning.
        token: (B, V) int64: which of the sample's visual tokens each is (a column of the layout).
        slot_valid: (B, V) bool, False in padding slots, whose decision does not count.
        counts: for each sample, how many visual tokens the budget leaves here; None without a
            budget.
        sample_key: (B,) int64 drawn from each sample's own text tokens, so that seeded randomness
            differs between samples and does not depend on the batch.
        min_tokens, min_per_image: visual tokens that every sample, every image keeps at least.
    """

    layout: Layout
    token: Tensor
    slot_valid: Tensor
    counts: tuple[int, ...] | None
    sample_key: Tensor
    min_tokens: int = 1
    min_per_image: int = 0

    @property
    def image(self) -> Tensor:
        """(B, V) int64: the number, within its sample, of the image that each token is of."""
        return self.of_token(self.layout.image)

    def of_token(self, table: Tensor) -> Tensor:
        """(B, V, ...) values of the tokens that are left, from a (B, V0, ...) table over the
        layout's columns.
        """
        index = self.token.reshape(*self.token.shape, *[1] * (table.ndim - 2))
        return table.gather(1, index.expand(*self.token.shape, *table.shape[2:]))

    def to_table(self, values: Tensor, fill: float = 0) -> Tensor:
        """(B, V0) table over the layout's columns of (B, V) values of the tokens that are left.

        Args:
            fill: value of the tokens that are gone, and of padding slots.
        """
        batch, width = self.layout.valid.shape
        column = torch.where(self.slot_valid, self.token, width)
        table = values.new_full((batch, width + 1), fill)
        return table.scatter(1, column, values)[:, :width]

    def counts_tensor(self) -> Tensor:
        """(B,) int64 ``counts`` on the device of the tokens.

        Raises:
            ConfigError: where the patch was made without a budget.
        """
        if self.counts is None:
            raise ConfigError(
                "this method needs a number of tokens to keep, and there is none: patch with "
                "keep= or target_tokens=."
            )
        return torch.tensor(self.counts, dtype=torch.long, device=self.slot_valid.device)


@dataclass(frozen=True, kw_only=True)
class DoorView(TokenView):
    """What a door method sees before the decoder's layer 0 runs.

    Attributes:
        features: (B, V, D) of the visual tokens as the projector made them; 0 in padding slots.
        text: (B, T, D) embeddings of the prompt's text, without what is to be answered;
            ``text_valid`` (B, T) bool; ``text_position`` (B, T) int64 places in the sequence, as of
            ``layout.position`` (a system prompt may stand in front of the images).
        tower: block -> what the vision tower did there, for the blocks that the method asked for
            under the number by which it asked.
    """

    features: Tensor
    text: Tensor
    text_valid: Tensor
    text_position: Tensor
    tower: Mapping[int, TowerTokens] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of one decoder layer, and where in it the tokens stood that are left now.

    ``L'`` are the tokens that this layer ran on: more than are left, where some were pruned since.

    Attributes:
        query, key: (B, H, L', d) and (B, Hk, K, d), after rotary embedding.
        mask: what the attention masked with.
        scaling: factor of the attention logits; ``softcap`` and ``sinks`` (H,) as of
            :func:`atp_patch.maths.cross_scores`, where the host has them.
        slot: (B, V) places of the visual tokens that are left now, among the ``L'``; their place
            among the ``K`` keys is ``slot + key_offset``.
        text: (B, T) places of the text rows that count, and ``last`` (B,) that of the last prompt
            token, among the ``L'``.
        unrotated: gives query (B, H, L', d) and key (B, Hk, L', d) of this forward pass before
            rotary embedding.
    """

    query: Tensor
    key: Tensor
    mask: AttentionMask
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    slot: Tensor
    text: Tensor
    last: Tensor
    unrotated: Callable[[], tuple[Tensor, Tensor]]

    @property
    def key_offset(self) -> int:
        """Keys of earlier turns that stand before this forward pass's own."""
        return self.key.shape[2] - self.query.shape[2]


@dataclass(frozen=True, kw_only=True)
class View(TokenView):
    """What a layer method sees before decoder layer ``layer`` runs.

    ``L'`` are the tokens that are left, those of the text included. Queries, keys and what belongs
    to them (``query``, ``key``, ``mask_rows``, ``scaling``, ...) are those of ``layer - 1``.

    Attributes:
        layer: the decoder layer about to run.
        step: which of the pruning layers this is, from 0.
        attention: the attention of the layers that the method asked for
            (:meth:`LayerMethod.attention_layers`), by their numbers.
        hidden: (B, L', D), the hidden states that would enter ``layer``.
        slot: (B, V) places of the visual tokens that are left among the ``L'``.
        text, text_valid: (B, T) places of the text rows that count, among the ``L'``;
            ``text_position`` in the sequence.
        last: (B,) place of the last prompt token, among the ``L'``.
        learning: the decision needs a ``soft`` mask.
        embeds: (B, L, D) what entered the decoder, all tokens in their places.
        state: what the method itself put here at earlier pruning layers of the same forward pass;
            empty at the first one. A table over the layout's columns (:meth:`to_table`) is read
            back for the tokens that are left by :meth:`of_token`.
    """

    layer: int
    step: int
    attention: Mapping[int, Attention]
    hidden: Tensor
    slot: Tensor
    text: Tensor
    text_valid: Tensor
    text_position: Tensor
    last: Tensor
    learning: bool = False
    embeds: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> Attention:
        """The attention of the layer before.

        Raises:
            ConfigError: where the method did not ask for it.
        """
        if self.layer - 1 not in self.attention:
            raise ConfigError(
                f"the attention of layer {self.layer - 1} was not asked for; the method's "
                f"attention_layers({self.layer}) must name it."
            )
        return self.attention[self.layer - 1]

    @property
    def query(self) -> Tensor:
        """(B, H, L', d) queries of the layer before, after rotary embedding."""
        return self.before.query

    @property
    def key(self) -> Tensor:
        """(B, Hk, K, d) keys of the layer before, after rotary embedding."""
        return self.before.key

    @property
    def scaling(self) -> float:
        """Factor of the attention logits of the layer before."""
        return self.before.scaling

    @property
    def softcap(self) -> float | None:
        """Bound of the attention logits of the layer before, where the host has one."""
        return self.before.softcap

    @property
    def sinks(self) -> Tensor | None:
        """(H,) a further logit of each head of the layer before, where the host has them."""
        return self.before.sinks

    @property
    def key_offset(self) -> int:
        """Keys of earlier turns that stand before this forward pass's own."""
        return self.before.key_offset

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Query (B, H, L', d) and key (B, Hk, L', d) of the layer before and of this forward pass,
        before rotary embedding.
        """
        return self.before.unrotated()

    def mask_rows(self, rows: Tensor) -> Tensor:
        """What some rows see: (B, h, T, K) bool (True = visible) or float (added to the logits),
        ``h`` being 1 or H.

        Args:
            rows: (B, T) places among the tokens that are left, as ``text`` or ``last[:, None]``.
        """
        return self.before.mask.rows(rows)

    @cached_property
    def mask(self) -> Tensor:
        """What all rows see, broadcastable to (B, H, L', K); :meth:`mask_rows` costs less."""
        return self.before.mask.whole(self.query.device)

    @cached_property
    def features(self) -> Tensor:
        """(B, V, D) hidden states of the visual tokens that are left; 0 in padding slots."""
        place = self.slot.to(self.hidden.device)[..., None]
        states = self.hidden.gather(1, place.expand(-1, -1, self.hidden.shape[-1]))
        return states.to(self.slot.device).masked_fill(~self.slot_valid[..., None], 0)
