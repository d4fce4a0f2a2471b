"""What one forward pass with images did: for people, for plots, for losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from atp_patch.contract import Decision, DecoderShape, Layout, VisualGrid
from atp_patch.maths import kv_bytes, prefill_flops


@dataclass(frozen=True)
class LayerTrace:
    """What happened before one pruning layer.

    Attributes:
        kept_counts: visual tokens of each sample that went on.
        thresholds: name -> (B,) float32, where the method has them.
    """

    layout: Layout
    kept_counts: tuple[int, ...]
    decision: Decision | None
    token: Tensor
    token_valid: Tensor
    alive: tuple[Tensor, Tensor | None] | None
    attended: Tensor | None

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """Name -> (B,) float32; empty where the method has none, or the budget keeps everything."""
        return {} if self.decision is None else self.decision.thresholds

    @cached_property
    def kept(self) -> Tensor:
        """(B, L) bool in original positions: tokens that enter this layer, text included, no
        padding.
        """
        batch, length = self.layout.valid.shape[0], self.layout.length
        if self.alive is not None:
            index, valid = self.alive
            spare = index if valid is None else torch.where(valid, index, length)
            mask = torch.zeros(batch, length + 1, dtype=torch.bool, device=index.device)
            return mask.scatter_(1, spare, True)[:, :length]
        if self.attended is not None:
            return self.attended
        return torch.ones(batch, length, dtype=torch.bool, device=self.layout.valid.device)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Name -> (B, L) float32 in original positions, NaN where nothing was scored."""
        if self.decision is None:
            return {}
        batch, length = self.layout.valid.shape[0], self.layout.length
        position = self.layout.position.gather(1, self.token)
        spare = torch.where(self.token_valid, position, length)
        return {
            name: values.new_full((batch, length + 1), torch.nan).scatter(1, spare, values)[
                :, :length
            ]
            for name, values in self.decision.scores.items()
        }


@dataclass(frozen=True)
class PruningTrace:
    """One forward pass with images through a patched model.

    Attributes:
        layers: pruning layer -> what happened before it.
        shape: sizes of the decoder.
        text_tokens: tokens of each sample that no method may prune.
        bytes_per_element: of the key/value cache.
        losses: in training, what was added to the loss before weighing: "atp" and "target".
    """

    layers: dict[int, LayerTrace]
    layout: Layout
    shape: DecoderShape
    text_tokens: tuple[int, ...]
    bytes_per_element: int
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def visual(self) -> Tensor:
        """(B, L) bool: the prunable visual tokens."""
        return self.layout.mask

    @property
    def grids(self) -> tuple[tuple[VisualGrid, ...], ...]:
        """For each sample, where its images, tiles or videos lie."""
        return self.layout.grids

    @cached_property
    def tokens_per_layer(self) -> Tensor:
        """(B, decoder layers) int64: the visual tokens that enter each layer."""
        rows = []
        for b, total in enumerate(self.layout.totals):
            count, row = total, []
            for layer in range(self.shape.num_layers):
                if layer in self.layers:
                    count = self.layers[layer].kept_counts[b]
                row.append(count)
            rows.append(row)
        return torch.tensor(rows, dtype=torch.long)

    @property
    def average_tokens(self) -> float:
        """Visual tokens averaged over all decoder layers and the samples that have images."""
        seen = [b for b, total in enumerate(self.layout.totals) if total]
        return float(self.tokens_per_layer[seen].double().mean())

    @property
    def visual_tokens(self) -> float:
        """Visual tokens before pruning, averaged over the samples that have images."""
        totals = [total for total in self.layout.totals if total]
        return sum(totals) / len(totals)

    @property
    def flops(self) -> float:
        """Exact FLOPs of the decoder's prefill for this batch, padding not counted."""
        return sum(self._flops(row) for row in self._lengths(self.tokens_per_layer))

    @property
    def flops_plain(self) -> float:
        """The same without pruning."""
        return sum(self._flops(row) for row in self._lengths(self._unpruned))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in the cache after the prefill, padding not counted."""
        return sum(self._kv_bytes(row) for row in self._lengths(self.tokens_per_layer))

    @property
    def kv_bytes_plain(self) -> int:
        """The same without pruning."""
        return sum(self._kv_bytes(row) for row in self._lengths(self._unpruned))

    @property
    def _unpruned(self) -> Tensor:
        totals = torch.tensor(self.layout.totals, dtype=torch.long)
        return totals[:, None].expand(-1, self.shape.num_layers)

    def _lengths(self, visual: Tensor) -> list[list[int]]:
        """Tokens, text included, of each sample at each layer."""
        return (visual + torch.tensor(self.text_tokens)[:, None]).tolist()

    def _flops(self, tokens_per_layer: list[int]) -> float:
        shape = self.shape
        return prefill_flops(
            tokens_per_layer,
            hidden_size=shape.hidden_size,
            mlp_sizes=shape.mlp_sizes,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
        )

    def _kv_bytes(self, tokens_per_layer: list[int]) -> int:
        shape = self.shape
        return kv_bytes(
            tokens_per_layer, shape.num_kv_heads, shape.head_dim, self.bytes_per_element
        )
