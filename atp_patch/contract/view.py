"""What a method sees when it decides, at the decoder's door or before one of its layers.

Shapes: ``B`` batch, ``L`` sequence, ``V`` visual tokens (packed, padded to the longest sample),
``T`` text rows, ``H`` heads, ``Hk`` key/value heads, ``K`` keys, ``d`` head size, ``D`` hidden
size, ``V0`` visual tokens before any pruning.
"""

from __future__ import annotations

import warnings
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
    """What door and layer methods see of the visual tokens that are left.

    Attributes:
        layout: the visual tokens before any pruning.
        token: (B, V) int64, for each token that is left, its column in the layout.
        slot_valid: (B, V) bool, False in padding slots, where the decision is ignored.
        counts: for each sample, the number of visual tokens that the budget keeps here; None
            without a budget.
        sample_key: (B,) int64, a number computed from each sample's text tokens, so that seeded
            randomness differs between samples and does not depend on the batch.
        min_tokens: number of visual tokens that every sample must keep at least.
        min_tokens_per_image: number of visual tokens that every image must keep at least.
    """

    layout: Layout
    token: Tensor
    slot_valid: Tensor
    counts: tuple[int, ...] | None
    sample_key: Tensor
    min_tokens: int = 1
    min_tokens_per_image: int = 0

    @property
    def min_per_image(self) -> int:
        """The former name of :attr:`min_tokens_per_image`."""
        warnings.warn(
            f"{type(self).__name__}.min_per_image is called min_tokens_per_image now.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.min_tokens_per_image

    @property
    def image(self) -> Tensor:
        """(B, V) int64: for each token, the number of its image within the sample."""
        return self.of_token(self.layout.image)

    def of_token(self, table: Tensor) -> Tensor:
        """Read a table over the layout's columns, (B, V0, ...), for the tokens that are left.

        Returns:
            (B, V, ...) values of the tokens that are left.
        """
        index = self.token.reshape(*self.token.shape, *[1] * (table.ndim - 2))
        return table.gather(1, index.expand(*self.token.shape, *table.shape[2:]))

    def to_table(self, values: Tensor, fill: float = 0) -> Tensor:
        """Write values of the tokens that are left to a table over the layout's columns, (B, V0).

        Args:
            values: (B, V) values of the tokens that are left.
            fill: value for tokens that are pruned already, and for padding slots.
        """
        batch, width = self.layout.valid.shape
        column = torch.where(self.slot_valid, self.token, width)
        table = values.new_full((batch, width + 1), fill)
        return table.scatter(1, column, values)[:, :width]

    def counts_tensor(self) -> Tensor:
        """Return (B,) int64: the ``counts`` as a tensor on the device of the tokens.

        Raises:
            ConfigError: if the patch was made without a budget.
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
        features: (B, V, D), the visual tokens' features from the projector; 0 in padding slots.
        text: (B, T, D), the embeddings of the prompt's text, without the answer.
        text_valid: (B, T) bool, False in padding slots of ``text``.
        text_position: (B, T) int64, positions of the text tokens in the sequence, comparable with
            ``layout.position``.
        text_ids: (B, T) int64, the ids of the text tokens; None if the prompt was given as
            embeddings alone.
        relevance: (B, V) float32, the cosine of each visual token with the question in the space of
            the CLIP model that the method names as its ``text_encoder``; None without one.
        tower: for each number in the method's ``tower_blocks``, the attention of that block of the
            vision tower.
    """

    features: Tensor
    text: Tensor
    text_valid: Tensor
    text_position: Tensor
    text_ids: Tensor | None = None
    relevance: Tensor | None = None
    tower: Mapping[float, TowerTokens] = field(default_factory=dict)

    @property
    def question(self) -> Tensor:
        """(B, T) bool: the text behind the first visual token, or all of it if none is there."""
        first = self.layout.position.masked_fill(~self.layout.valid, self.layout.length)
        behind = self.text_valid & (self.text_position > first.amin(1, keepdim=True))
        return torch.where(behind.any(1, keepdim=True), behind, self.text_valid)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of one decoder layer, and the places in it of the tokens that are left now.

    ``L'`` is the number of tokens that the layer ran on. Some of them may have been pruned since.

    Attributes:
        query: (B, H, L', d), queries after rotary embedding.
        key: (B, Hk, K, d), keys after rotary embedding.
        mask: the attention mask.
        scaling: factor of the attention logits.
        softcap: the softcap of the attention logits, as :func:`atp_patch.maths.cross_scores` takes
            it, or None.
        sinks: (H,), the attention sinks, as :func:`atp_patch.maths.cross_scores` takes them, or
            None.
        slot: (B, V) int64, places among the ``L'`` tokens of the visual tokens that are left now;
            their places among the ``K`` keys are ``slot + key_offset``.
        text: (B, T) int64, places among the ``L'`` tokens of the text rows that scores may read.
        last: (B,) int64, place of the last prompt token among the ``L'`` tokens.
        unrotated: a function that returns the query (B, H, L', d) and key (B, Hk, L', d) of this
            forward pass before rotary embedding.
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
        """Number of keys of earlier turns, which come before the keys of this forward pass."""
        return self.key.shape[2] - self.query.shape[2]


@dataclass(frozen=True, kw_only=True)
class View(TokenView):
    """What a layer method sees before decoder layer ``layer`` runs.

    ``L'`` is the number of tokens that are left, text included. ``query``, ``key``, ``mask_rows``,
    ``scaling`` and the like are those of the attention of ``layer - 1``.

    Attributes:
        layer: the decoder layer about to run.
        step: the number of this pruning layer among all pruning layers, from 0.
        attention: for each layer in the method's :meth:`LayerMethod.attention_layers`, its
            attention; for one that keeps a state in place of keys, that of the last layer before it
            that attends, among the tokens that entered the one named.
        hidden: (B, L', D), the hidden states that would enter ``layer``.
        slot: (B, V) int64, places of the visual tokens among the ``L'`` tokens.
        text: (B, T) int64, places among the ``L'`` tokens of the text rows that scores may read.
        text_valid: (B, T) bool, False in padding slots of ``text``.
        text_position: (B, T) int64, positions of the text rows in the sequence.
        last: (B,) int64, place of the last prompt token among the ``L'`` tokens.
        learning: whether the decision needs a ``soft`` mask.
        embeds: (B, L, D), the embeddings of all tokens as they entered the decoder.
        state: values that the method stored at earlier pruning layers of the same forward pass;
            empty at the first one. A table over the layout's columns (:meth:`to_table`) can be read
            later for the tokens that are left then (:meth:`of_token`).
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
    def previous_attention(self) -> Attention:
        """The attention of layer ``layer - 1``.

        Raises:
            ConfigError: if the method's ``attention_layers`` do not name it.
        """
        if self.layer - 1 not in self.attention:
            raise ConfigError(
                f"the attention of layer {self.layer - 1} was not recorded; the method's "
                f"attention_layers({self.layer}) must name it."
            )
        return self.attention[self.layer - 1]

    @property
    def query(self) -> Tensor:
        """(B, H, L', d) queries of the layer before, after rotary embedding."""
        return self.previous_attention.query

    @property
    def key(self) -> Tensor:
        """(B, Hk, K, d) keys of the layer before, after rotary embedding."""
        return self.previous_attention.key

    @property
    def scaling(self) -> float:
        """Factor of the attention logits of the layer before."""
        return self.previous_attention.scaling

    @property
    def softcap(self) -> float | None:
        """The softcap of the attention logits of the layer before, or None."""
        return self.previous_attention.softcap

    @property
    def sinks(self) -> Tensor | None:
        """(H,): the attention sinks of the layer before, or None."""
        return self.previous_attention.sinks

    @property
    def key_offset(self) -> int:
        """Number of keys of earlier turns, which come before the keys of this forward pass."""
        return self.previous_attention.key_offset

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Return the queries and keys of the layer before, without rotary embedding.

        Returns:
            (B, H, L', d) queries and (B, Hk, L', d) keys of this forward pass.
        """
        return self.previous_attention.unrotated()

    def mask_rows(self, rows: Tensor) -> Tensor:
        """Return the attention mask of some rows in the layer before.

        Args:
            rows: (B, T) int64, places among the tokens that are left, such as ``text`` or
                ``last[:, None]``.

        Returns:
            (B, h, T, K) bool (True = visible) or float (added to the logits); ``h`` is 1 or H.
        """
        return self.previous_attention.mask.rows(rows)

    @cached_property
    def mask(self) -> Tensor:
        """The attention mask of all rows in the layer before, broadcastable to (B, H, L', K).

        :meth:`mask_rows` costs less.
        """
        return self.previous_attention.mask.whole(self.query.device)

    @cached_property
    def features(self) -> Tensor:
        """(B, V, D): the hidden states of the visual tokens that are left; 0 in padding slots."""
        place = self.slot.to(self.hidden.device)[..., None]
        states = self.hidden.gather(1, place.expand(-1, -1, self.hidden.shape[-1]))
        return states.to(self.slot.device).masked_fill(~self.slot_valid[..., None], 0)
