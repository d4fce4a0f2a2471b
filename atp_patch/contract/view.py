"""What a method sees before a decoder layer.

Shapes: ``B`` batch, ``L`` sequence, ``V`` visual tokens (packed, padded to the longest sample),
``T`` text rows, ``H`` heads, ``Hk`` key/value heads, ``K`` keys, ``d`` head size, ``D`` hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_patch.contract.layout import Layout


@dataclass(frozen=True)
class View:
    """What a method sees before decoder layer ``layer`` runs.

    Attributes:
        layer: the decoder layer about to run; ``query``, ``key`` and ``mask`` are of ``layer - 1``.
        step: which of the pruning layers this is, from 0.
        query, key: (B, H, L', d) and (B, Hk, K, d), after rotary embedding; ``L'`` tokens are left.
        mask: what the attention of ``layer - 1`` masked with, broadcastable to (B, H, L', K): bool
            (True = visible) or float (added to the logits).
        scaling: factor of the attention logits; ``softcap`` and ``sinks`` (H,) as of
            :func:`atp_patch.maths.cross_scores`, where the host has them.
        hidden: (B, L', D), the hidden states that would enter ``layer``.
        slot, slot_valid: (B, V) places of the surviving visual tokens among the ``L'``; their place
            among the ``K`` keys is ``slot + key_offset``.
        token: (B, V) which of the sample's visual tokens each is (a column of the layout).
        text, text_valid: (B, T) places of the text rows that count, among the ``L'``;
            ``text_position`` in the sequence.
        last: (B,) place of the last prompt token, among the ``L'``.
        layout: the visual tokens before any pruning.
        counts: for each sample, how many visual tokens the budget leaves here; None without a
            budget.
        sample_key: (B,) int64 drawn from each sample's own text tokens, so that seeded randomness
            differs between samples and does not depend on the batch.
        min_tokens, min_per_image: visual tokens that every sample, every image keeps at least.
        learning: the decision needs a ``soft`` mask.
        embeds: (B, L, D) what entered the decoder, all tokens in their places.
        unrotated: gives query (B, H, L', d) and key (B, Hk, L', d) of this forward pass before
            rotary embedding.
    """

    layer: int
    step: int
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    hidden: Tensor
    slot: Tensor
    slot_valid: Tensor
    token: Tensor
    text: Tensor
    text_valid: Tensor
    text_position: Tensor
    last: Tensor
    layout: Layout
    counts: tuple[int, ...] | None
    sample_key: Tensor
    min_tokens: int = 1
    min_per_image: int = 0
    learning: bool = False
    embeds: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    unrotated: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def key_offset(self) -> int:
        """Keys of earlier turns that stand before this forward pass's own."""
        return self.key.shape[2] - self.query.shape[2]

    def of_token(self, table: Tensor) -> Tensor:
        """(B, V) values of the surviving tokens from a (B, V0) table over the layout's columns."""
        return table.gather(1, self.token)

    def counts_tensor(self) -> Tensor:
        """(B,) int64 ``counts`` on the device of the scores."""
        if self.counts is None:
            raise ValueError("this method needs a budget: give keep= or target_tokens=")
        return torch.tensor(self.counts, dtype=torch.long, device=self.slot.device)
