"""Plain data that the rooms share: where visual tokens lie, what a method sees, what it decides.

Shapes: ``B`` batch, ``L`` sequence, ``V`` visual tokens (packed, padded to the longest sample),
``T`` text rows, ``H`` heads, ``Hk`` key/value heads, ``K`` keys, ``d`` head size, ``D`` hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualGrid:
    """One image, tile or video in the sequence: ``frames`` x ``height`` x ``width`` tokens.

    The token of (frame, row, column) stands at
    ``start + frame * frame_stride + row * row_stride + column``; strides of 0 mean "no gaps".
    Tokens in the gaps (a newline after each row, a class token of each frame) belong to no grid and
    are never pruned.
    """

    start: int
    frames: int
    height: int
    width: int
    row_stride: int = 0
    frame_stride: int = 0

    @property
    def length(self) -> int:
        """How many visual tokens the grid has."""
        return self.frames * self.height * self.width

    def coordinates(self) -> Tensor:
        """(4, length) int64: position in the sequence, frame, row, column; row-major."""
        row_stride = self.row_stride or self.width
        frame_stride = self.frame_stride or row_stride * self.height
        frame, row, column = torch.meshgrid(
            torch.arange(self.frames),
            torch.arange(self.height),
            torch.arange(self.width),
            indexing="ij",
        )
        position = self.start + frame * frame_stride + row * row_stride + column
        return torch.stack([position, frame, row, column]).reshape(4, -1)


@dataclass(frozen=True)
class Layout:
    """Where the prunable visual tokens of one forward pass lie.

    Attributes:
        length: sequence length ``L`` of the forward pass.
        grids: for each sample, its grids in sequence order.
        position, image, frame, row, column: (B, V) int64; ``position`` in the sequence, ``image``
            the number of the grid within the sample. 0 in padding slots.
        valid: (B, V) bool, False in padding slots.
    """

    length: int
    grids: tuple[tuple[VisualGrid, ...], ...]
    position: Tensor
    image: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    valid: Tensor

    @classmethod
    def from_grids(
        cls, grids: Sequence[Sequence[VisualGrid]], length: int, device: torch.device
    ) -> Layout:
        """Lay out each sample's grids (on ``device``); samples without images have an empty
        list.
        """
        totals = [sum(grid.length for grid in sample) for sample in grids]
        table = torch.zeros(5, len(totals), max(totals, default=0), dtype=torch.long)
        for b, sample in enumerate(grids):
            at = 0
            for number, grid in enumerate(sample):
                stop = at + grid.length
                position, frame, row, column = grid.coordinates()
                image = torch.full_like(position, number)
                table[:, b, at:stop] = torch.stack([position, image, frame, row, column])
                at = stop
        slots = torch.arange(table.shape[-1])
        valid = slots < torch.tensor(totals, dtype=torch.long).unsqueeze(-1)
        position, image, frame, row, column = table.to(device).unbind()
        frozen = tuple(tuple(sample) for sample in grids)
        return cls(length, frozen, position, image, frame, row, column, valid.to(device))

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        tensors = (self.position, self.image, self.frame, self.row, self.column, self.valid)
        return Layout(self.length, self.grids, *(t.to(device) for t in tensors))

    @property
    def totals(self) -> tuple[int, ...]:
        """Prunable visual tokens of each sample before any pruning."""
        return tuple(sum(grid.length for grid in sample) for sample in self.grids)

    @cached_property
    def mask(self) -> Tensor:
        """(B, L) bool: the prunable visual tokens in the sequence."""
        mask = torch.zeros(
            len(self.grids), self.length + 1, dtype=torch.bool, device=self.position.device
        )
        # Padding slots write to a column of their own, cut off after.
        column = torch.where(self.valid, self.position, self.length)
        return mask.scatter_(1, column, True)[:, : self.length]


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


@dataclass(frozen=True)
class Recycled:
    """Kept tokens that take in others: what they carry on is a sum of hidden states.

    Attributes:
        column: (B, C) int64 over the view's visual tokens, kept ones; ``valid`` (B, C) bool.
        weight: (B, C, V) float32 of each visual token's hidden state.
    """

    column: Tensor
    valid: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Decision:
    """What a method decided before one layer.

    Attributes:
        keep: (B, V) bool over the view's surviving visual tokens.
        exact: True if ``keep`` keeps exactly the view's ``counts`` (saves a device
            synchronisation).
        scores: name -> (B, V) float32.
        thresholds: name -> (B,) float32.
        soft: (B, V) float32, where the view asks for learning: 1 kept, 0 not, with a gradient.
        counted: the same numbers, with the gradient that losses of their count take; None: that
            of ``soft``.
        recycled: which kept tokens take in others; None: none does.
    """

    keep: Tensor
    exact: bool = False
    scores: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    soft: Tensor | None = None
    counted: Tensor | None = None
    recycled: Recycled | None = None


@dataclass(frozen=True)
class Span:
    """A run of equal placeholder ids in one sample: positions ``start`` to ``stop - 1``."""

    start: int
    stop: int
    token_id: int

    @property
    def length(self) -> int:
        """How many placeholders the run has."""
        return self.stop - self.start


@dataclass(frozen=True)
class GridQuery:
    """What a family may look at to say where the grids lie.

    Attributes:
        config: the config of the whole vision-language model.
        spans: for each sample, its runs of visual placeholders in order.
        position_ids: (..., B, L) int64 on the CPU as the decoder got them, or None.
        ids: (B, L) int64 on the CPU, or None where only embeddings were given.
        newlines: (B, L) bool on the CPU, the visual places that hold the model's newline feature;
            None for families without one.
        visual: (B, L) bool on the CPU, the visual places.
        sizes: for each sample the (frames, height, width) that the caller gave, or None.
    """

    config: object
    spans: Sequence[Sequence[Span]]
    position_ids: Tensor | None
    ids: Tensor | None = None
    newlines: Tensor | None = None
    visual: Tensor | None = None
    sizes: Sequence[Sequence[tuple[int, int, int]]] | None = None


@dataclass(frozen=True)
class Outer:
    """How a model of another package holds a causal language model of transformers and feeds it.

    It writes visual features among the embeddings itself and calls the language model with
    ``inputs_embeds``, so one of the two last attributes says how visual positions are known.

    Attributes:
        decoder: its attribute that holds the language model, head included.
        embed: its method (input_ids, ..., labels, ...) -> (embeddings, labels, attention mask), of
            which the labels are -100 at visual positions; or None.
        image_token: its attribute that holds the id of the placeholders in ``input_ids``; or None.
        mend: what to do with an object that does not have these.
    """

    decoder: str
    embed: str | None = None
    image_token: str | None = None
    mend: str = ""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the language decoder, for costs: of an MLP of experts, those that a token visits."""

    num_layers: int
    hidden_size: int
    mlp_sizes: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
