"""What one forward pass with images did, to print, to plot and to compute costs from."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from atp_patch.contract import Decision, DecoderShape, Layout, VisualGrid
from atp_patch.maths import kv_bytes, prefill_flops
from atp_patch.patching.trace_table import Table, as_html, as_text


@dataclass(frozen=True, repr=False)
class LayerTrace:
    """What happened before one pruning layer: which tokens were kept, and by which scores.

    ``print(trace)`` shows a table of the samples. ``B`` samples, ``L`` tokens of the forward pass,
    ``V`` visual tokens that the method saw, padded to the longest sample, ``N`` kept tokens.

    Attributes:
        layout: where the prunable visual tokens of the prompt are.
        kept_counts: for each of the B samples, the number of visual tokens that were kept.
        decision: the method's decision about the V tokens that it saw. None if no method decided:
            before the decoder, and where the budget keeps everything.
        token: (B, V) int64, for each token that the method saw, its column in ``layout``.
        token_valid: (B, V) bool, False in padding slots of ``token``.
        alive: the tokens that were kept, text included: their positions in the sequence, (B, N)
            int64, and (B, N) bool that is False in padding slots or None if there are none. None if
            nothing has been pruned yet.
        attended: (B, L) bool, False at padding; None without padding.
    """

    layout: Layout
    kept_counts: tuple[int, ...]
    decision: Decision | None
    token: Tensor
    token_valid: Tensor
    alive: tuple[Tensor, Tensor | None] | None
    attended: Tensor | None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.kept_counts)} samples, kept {sum(self.kept_counts)} "
            f"of {sum(self.layout.totals)} visual tokens)"
        )

    def __str__(self) -> str:
        return as_text(repr(self), [self._table])

    def _repr_html_(self) -> str:
        return as_html(repr(self), [self._table])

    @property
    def _table(self) -> Table:
        rows = [
            (str(b), str(total), str(kept), _listed(self.thresholds, [b]))
            for b, (total, kept) in enumerate(
                zip(self.layout.totals, self.kept_counts, strict=True)
            )
        ]
        columns = ("sample", "visual tokens in the prompt", "kept", "thresholds")
        return Table(columns, rows, words=frozenset({"thresholds"}))

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """For each name, (B,) thresholds; empty without thresholds or if everything is kept."""
        return {} if self.decision is None else self.decision.thresholds

    @cached_property
    def kept(self) -> Tensor:
        """(B, L) bool, True at the positions of tokens that enter this layer.

        It is True for text that is kept and False for padding.
        """
        batch, length = self.layout.valid.shape[0], self.layout.length
        if self.alive is not None:
            index, valid = self.alive
            column = index if valid is None else torch.where(valid, index, length)
            mask = torch.zeros(batch, length + 1, dtype=torch.bool, device=index.device)
            return mask.scatter_(1, column, True)[:, :length]
        if self.attended is not None:
            return self.attended
        return torch.ones(batch, length, dtype=torch.bool, device=self.layout.valid.device)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """For each name, (B, L) scores by position; NaN where nothing was scored."""
        if self.decision is None:
            return {}
        batch, length = self.layout.valid.shape[0], self.layout.length
        position = self.layout.position.gather(1, self.token)
        column = torch.where(self.token_valid, position, length)
        return {
            name: values.new_full((batch, length + 1), torch.nan).scatter(1, column, values)[
                :, :length
            ]
            for name, values in self.decision.scores.items()
        }


class Illustration(Protocol):
    """Draws a trace over the pictures of its forward pass; `atp_patch.visualize` makes one."""

    def png(self, trace: PruningTrace) -> bytes:
        """Return the drawing as a PNG file."""


@dataclass(frozen=True, repr=False)
class PruningTrace:
    """One forward pass with images through a patched model.

    ``print(trace)`` shows what each pruning layer kept and what was saved, as a notebook does. A
    notebook also shows the tokens that were kept, if :func:`atp_patch.visualize.with_pictures` has
    told the trace what the model saw.

    Attributes:
        layers: for each pruning layer, what happened before it.
        layout: where the prunable visual tokens of the prompt are.
        shape: sizes of the decoder.
        text_tokens: for each sample, the number of tokens that no method may prune.
        bytes_per_element: size in bytes of one number in the key/value cache.
        losses: in training, the value of each loss that the method added, before its weight. ATP's
            are "atp" and "target".
        last_rows: (layer, rows), where this layer and later ones reuse keys and ran on the last
            ``rows`` tokens alone, because the call wanted no other logits; None where all layers
            ran on all tokens.
        illustration: what draws the trace over its pictures, or None where they are not known.
    """

    layers: dict[int, LayerTrace]
    layout: Layout
    shape: DecoderShape
    text_tokens: tuple[int, ...]
    bytes_per_element: int
    losses: dict[str, float] = field(default_factory=dict)
    last_rows: tuple[int, int] | None = None
    illustration: Illustration | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.layout.totals)} samples, "
            f"{self.visual_tokens:.1f} visual tokens, {self.average_tokens:.1f} on average over "
            f"{self.shape.num_layers} layers, pruned before {list(self.layers)})"
        )

    def __str__(self) -> str:
        return as_text(repr(self), self._tables)

    def _repr_html_(self) -> str:
        picture = self._repr_png_()
        if picture is None:
            return as_html(repr(self), self._tables)
        source = f"data:image/png;base64,{b64encode(picture).decode('ascii')}"
        image = f'<img alt="visual tokens that each pruning layer keeps" src="{source}">'
        return as_html(repr(self), self._tables) + image

    def _repr_png_(self) -> bytes | None:
        return None if self.illustration is None else self.illustration.png(self)

    @property
    def _tables(self) -> tuple[Table, Table]:
        """Tables of what each layer kept on average over samples with images, and of the costs."""
        seen = self._with_images
        counts = self.tokens_per_layer[seen].double().mean(0).tolist()
        rows = [
            (
                str(layer),
                f"{counts[layer - 1] if layer else self.visual_tokens:.1f}",
                f"{counts[layer]:.1f}",
                _listed(layer_trace.thresholds, seen),
            )
            for layer, layer_trace in self.layers.items()
        ]
        columns = ("before layer", "visual tokens in", "kept", "thresholds")
        costs = [
            (name, f"{plain:.2f}", f"{pruned:.2f}")
            for name, plain, pruned in (
                ("visual tokens, mean over layers", self.visual_tokens, self.average_tokens),
                ("prefill, GFLOPs", self.flops_plain / 1e9, self.flops / 1e9),
                ("key/value cache, MB", self.kv_bytes_plain / 1e6, self.kv_bytes / 1e6),
            )
        ]
        return (
            Table(columns, rows, words=frozenset({"thresholds"})),
            Table(("", "plain", "pruned"), costs, words=frozenset({""})),
        )

    @property
    def _with_images(self) -> list[int]:
        return [b for b, total in enumerate(self.layout.totals) if total]

    @property
    def visual(self) -> Tensor:
        """(B, L) bool, True at the prunable visual tokens."""
        return self.layout.mask

    @property
    def grids(self) -> tuple[tuple[VisualGrid, ...], ...]:
        """For each sample, where its images, tiles or videos are."""
        return self.layout.grids

    @cached_property
    def tokens_per_layer(self) -> Tensor:
        """(B, decoder layers) int64: the number of visual tokens that enter each layer."""
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
        """Mean number of visual tokens over all decoder layers and all samples with images."""
        return float(self.tokens_per_layer[self._with_images].double().mean())

    @property
    def visual_tokens(self) -> float:
        """Mean number of visual tokens before pruning over all samples with images."""
        totals = [total for total in self.layout.totals if total]
        return sum(totals) / len(totals)

    @property
    def flops(self) -> float:
        """Exact FLOPs of the decoder's prefill for this batch; padding is not counted."""
        return sum(self._flops(row) for row in self._lengths(self.tokens_per_layer))

    @property
    def flops_plain(self) -> float:
        """FLOPs of the same prefill without pruning."""
        return sum(self._flops(row) for row in self._lengths(self._unpruned))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in the cache after the prefill; padding is not counted."""
        return sum(self._kv_bytes(row) for row in self._lengths(self.tokens_per_layer))

    @property
    def kv_bytes_plain(self) -> int:
        """Bytes of keys and values after the same prefill without pruning."""
        return sum(self._kv_bytes(row) for row in self._lengths(self._unpruned))

    @property
    def _unpruned(self) -> Tensor:
        totals = torch.tensor(self.layout.totals, dtype=torch.long)
        return totals[:, None].expand(-1, self.shape.num_layers)

    def _lengths(self, visual: Tensor) -> list[list[int]]:
        """Return, for each sample and layer, the number of tokens, text included."""
        return (visual + torch.tensor(self.text_tokens)[:, None]).tolist()

    def _flops(self, tokens_per_layer: list[int]) -> float:
        shape = self.shape
        queries = list(tokens_per_layer)
        if self.last_rows is not None:
            first, rows = self.last_rows
            queries[first:] = [min(tokens, rows) for tokens in tokens_per_layer[first:]]
        return prefill_flops(
            tokens_per_layer,
            hidden_size=shape.hidden_size,
            mlp_sizes=shape.mlp_sizes,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dims,
            vocab_size=shape.vocab_size,
            states=shape.states,
            mixer_weights=shape.mixer_weights,
            queries_per_layer=queries,
        )

    def _kv_bytes(self, tokens_per_layer: list[int]) -> int:
        shape = self.shape
        if shape.kv_sizes:
            held = zip(tokens_per_layer, shape.kv_sizes, strict=True)
            return sum(tokens * size for tokens, size in held) * self.bytes_per_element
        return kv_bytes(
            tokens_per_layer, shape.num_kv_heads, shape.head_dims, self.bytes_per_element
        )


def _listed(thresholds: dict[str, Tensor], samples: list[int]) -> str:
    """Return the mean of each threshold over some samples as text, or a dash if there is none."""
    means = {name: float(value[samples].double().mean()) for name, value in thresholds.items()}
    return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()) or "-"
