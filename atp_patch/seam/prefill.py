"""The state of one forward pass that carries images: which tokens are left, layer by layer.

It travels with the forward pass itself, as a keyword that the decoder hands to its layers, so nothing
about a pass is kept on the model and gradient checkpointing replays the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from atp_patch.errors import CacheError
from atp_patch.maths import gather_tokens, local_index, pack, scatter_tokens
from atp_patch.seam.cache import adopt, stored_positions
from atp_patch.seam.narrow import is_flash, prefill_mask
from atp_patch.seam.prompt import TextRows
from atp_patch.seam.recorder import Recording
from atp_patch.types import Decision, Layout, View

Decide = Callable[[View], Decision]


@dataclass
class Survivors:
    """The tokens that enter the layers from one pruning layer up to the next.

    Attributes:
        index: (B, n) positions in this forward's sequence, in order; padding slots stand last.
        valid: (B, n) bool, or None where every slot holds a token.
        narrowed: what the host's tables became for these tokens, by their identity.
    """

    index: Tensor
    valid: Tensor | None
    narrowed: dict[Any, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Survivors:
        """The same survivors on another device."""
        return Survivors(self.index.to(device), None if self.valid is None else self.valid.to(device))

    @property
    def all_valid(self) -> Tensor:
        """(B, n) bool ``valid``, written out."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def slots(self, length: int) -> Tensor:
        """(B, length) int64: which slot holds each position of the sequence, -1 where none does."""
        return self.once("slots", None, lambda: local_index(self.index, self.all_valid, length))

    def mask(self, length: int) -> Tensor:
        """(B, length) bool: the positions that survive."""
        spare = torch.where(self.all_valid, self.index, length)
        mask = torch.zeros(spare.shape[0], length + 1, dtype=torch.bool, device=spare.device)
        return mask.scatter_(1, spare, True)[:, :length]

    def once(self, key: Any, source: Any, make: Callable[[], Any]) -> Any:
        """``make()`` once for each source object (which is kept alive, so its id stays its own)."""
        if key not in self.narrowed:
            self.narrowed[key] = (source, make())
        return self.narrowed[key][1]


@dataclass
class LayerRecord:
    """What one pruning layer did, for the trace: survivors' visual tokens and the decision."""

    decision: Decision
    token: Tensor
    token_valid: Tensor
    kept: tuple[int, ...]
    survivors: Survivors | None


class Prefill:
    """One forward pass with images through the decoder of a patched model."""

    def __init__(
        self,
        *,
        layout: Layout,
        text: TextRows,
        attended: Tensor | None,
        token_counts: Sequence[int],
        cache: Cache | None,
        plain_mask: bool,
        sliding_window: Callable[[int], int | None],
        implementation: str,
        frozen: dict[int, Tensor] | None,
    ) -> None:
        self.layout, self.text, self.attended = layout, text, attended
        self.cache, self.implementation = cache, implementation
        self.frozen = frozen
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.total = self.past + layout.length
        self.records: dict[int, LayerRecord] = {}
        self.survivors: Survivors | None = None
        self.recording: Recording | None = None
        self._plain_mask = plain_mask
        self._sliding_window = sliding_window
        self.prompt_tokens = tuple(token_counts)
        self._token_counts = list(token_counts)
        self._left = list(layout.totals)
        slots = torch.arange(layout.valid.shape[1], device=layout.valid.device)
        self._token = slots.expand_as(layout.valid)
        self._token_valid = layout.valid

    # -- choosing ---------------------------------------------------------------------------------

    @property
    def left(self) -> tuple[int, ...]:
        """Visual tokens that each sample still has."""
        return tuple(self._left)

    def record(self, recording: Recording) -> None:
        """Take the queries and keys of the layer before a pruning layer."""
        self.recording = recording

    def view(
        self, layer: int, step: int, hidden: Tensor, counts: tuple[int, ...] | None, minimum: int
    ) -> View:
        """What a method may look at before ``layer``; takes the recording of the layer before."""
        recording = self.recording
        assert recording is not None, "the layer before a pruning layer was not recorded"
        self.recording = None
        query, key, mask = recording.query, recording.key, recording.mask
        self._move(query.device)
        keys = query.shape[2] + self._past_keys(layer - 1)
        key = key[:, :, :keys]
        return View(
            layer=layer,
            step=step,
            query=query,
            key=key,
            mask=self._scoring_mask(mask, query, keys),
            scaling=recording.scaling,
            hidden=hidden,
            slot=self._slots(self.layout.position.gather(1, self._token)),
            slot_valid=self._token_valid,
            token=self._token,
            text=self._slots(self.text.position),
            text_valid=self.text.valid,
            last=self._slots(self.text.last[:, None])[:, 0],
            layout=self.layout,
            counts=counts,
            sample_key=self.text.sample_key,
            min_per_image=minimum,
        )

    def _move(self, device: torch.device) -> None:
        """Follow the decoder to the device of the layer that was recorded (a model may span several)."""
        if self.layout.position.device == device:
            return
        self.layout, self.text = self.layout.to(device), self.text.to(device)
        self._token, self._token_valid = self._token.to(device), self._token_valid.to(device)
        if self.attended is not None:
            self.attended = self.attended.to(device)
        if self.survivors is not None:
            self.survivors = self.survivors.to(device)

    def frozen_decision(self, layer: int) -> Decision | None:
        """The choice of the first pass of a generation without a cache, or None."""
        if self.frozen is None or layer not in self.frozen:
            return None
        kept = self.frozen[layer].to(self.layout.position.device)
        position = self.layout.position.gather(1, self._token)
        return Decision(keep=kept.gather(1, position) & self._token_valid)

    def apply(self, layer: int, decision: Decision, counts: tuple[int, ...] | None) -> bool:
        """Drop what the decision does not keep; False where everything stays and nothing changes."""
        keep = decision.keep & self._token_valid
        kept = list(counts) if decision.exact and counts is not None else keep.sum(1).tolist()
        record = LayerRecord(decision, self._token, self._token_valid, tuple(kept), None)
        self.records[layer] = record
        changed = kept != self._left
        if changed:
            self._narrow_to(keep, kept)
        record.survivors = self.survivors
        if self.frozen is not None and layer not in self.frozen:
            self.frozen[layer] = self.kept(layer)
        return changed

    def _narrow_to(self, keep: Tensor, kept: list[int]) -> None:
        position = self.layout.position.gather(1, self._token)
        gone = self._token_valid & ~keep
        length = self.layout.length
        if self.survivors is not None:
            alive = self.survivors.mask(length)
        elif self.attended is not None:
            alive = self.attended
        else:
            alive = position.new_ones(position.shape[0], length, dtype=torch.bool)
        # A spare last column takes the writes of slots that are not meant.
        alive = torch.nn.functional.pad(alive, (0, 1))
        alive = alive.scatter(1, torch.where(gone, position, length), False)
        for b, count in enumerate(kept):
            self._token_counts[b] -= self._left[b] - count
        longest = max(self._token_counts)
        index, valid = pack(alive[:, :length], length=longest)
        ragged = min(self._token_counts) < longest
        # A padding slot repeats the sample's first token: finite numbers that nothing ever sees.
        index = torch.where(valid, index, index[:, :1])
        self.survivors = Survivors(index, valid if ragged else None)
        chosen, chosen_valid = pack(keep, length=max(kept))
        self._token, self._token_valid = self._token.gather(1, chosen), chosen_valid
        self._left = kept

    def _slots(self, position: Tensor) -> Tensor:
        """Places of sequence positions among the tokens that are left."""
        if self.survivors is None:
            return position
        return self.survivors.slots(self.layout.length).gather(1, position).clamp(min=0)

    def _past_keys(self, layer: int) -> int:
        """Keys of earlier turns in a layer's cache (0 without one)."""
        if self.past == 0 or self.cache is None:
            return 0
        return int(self.cache.layers[layer].keys.shape[-2]) - self._width()

    def _width(self) -> int:
        return self.layout.length if self.survivors is None else self.survivors.index.shape[1]

    def _scoring_mask(self, mask: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
        """A wide mask over (Q, K) for the scores, whatever the attention itself was given."""
        if mask is not None and mask.ndim == 4:
            return mask[..., :keys]
        rows = query.shape[2]
        place = torch.arange(rows, device=query.device)
        column = torch.arange(keys, device=query.device) - (keys - rows)
        visible = (column <= place[:, None])[None, None]
        if mask is not None:
            visible = visible & mask[:, None, None, -keys:].bool()
        return visible

    # -- narrowing --------------------------------------------------------------------------------

    def narrow_hidden(self, hidden: Tensor, before: Survivors | None) -> Tensor:
        """(B, L', D) hidden states of the tokens before a pruning -> those of the survivors."""
        survivors = self.survivors
        assert survivors is not None
        index = survivors.index
        if before is not None:
            index = before.slots(self.layout.length).gather(1, index)
        return gather_tokens(hidden, index.to(hidden.device))

    def narrow_kwargs(self, layer: int, kwargs: dict[str, Any]) -> None:
        """Replace what the host hands to a layer by what the survivors need (in place)."""
        survivors = self.survivors
        assert survivors is not None
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = survivors.once(
                id(tables), tables, lambda: tuple(self._gather(t) for t in tables)
            )
        positions = kwargs.get("position_ids")
        if positions is not None:
            # Gaps in the positions would look like packed sequences to flash attention.
            kwargs["position_ids"] = (
                None
                if is_flash(self.implementation)
                else survivors.once(id(positions), positions, lambda: self._gather(positions))
            )
        mask = kwargs.get("attention_mask")
        # Layers that hold different earlier turns need different columns.
        held = getattr(self.cache.layers[layer], "positions", None) if self.past else None
        kwargs["attention_mask"] = survivors.once(
            ("mask", id(mask), id(held)), (mask, held), lambda: self._mask(layer, mask)
        )
        cache = kwargs.get("past_key_values")
        if cache is not None:
            self._mark_cache(cache, layer)

    def _gather(self, table: Tensor) -> Tensor:
        assert self.survivors is not None
        return gather_tokens(table, self.survivors.index.to(table.device))

    def _mask(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """The survivors' mask; None where causality is all that is needed."""
        window = self._sliding_window(layer)
        slides = window is not None and self.total > window
        if slides and is_flash(self.implementation):
            raise CacheError(
                f"{self.total} tokens do not fit the sliding window of {window} under flash attention, "
                "which measures it in stored keys; call model.set_attn_implementation('sdpa')."
            )
        if mask is None:
            return None
        causal_by_itself = self.implementation == "sdpa" or is_flash(self.implementation)
        keys, keys_valid = self._key_positions(layer, int(mask.shape[-1]))
        device = mask.device
        assert self.survivors is not None
        return prefill_mask(
            mask,
            self.survivors.index.to(device),
            keys.to(device),
            None if keys_valid is None else keys_valid.to(device),
            total=self.total,
            causal_suffices=self._plain_mask
            and causal_by_itself
            and self.past == 0
            and not slides,
        )

    def _key_positions(self, layer: int, mask_width: int) -> tuple[Tensor, Tensor | None]:
        """(B, K) logical positions of a layer's keys once the survivors are cached, and validity."""
        survivors = self.survivors
        assert survivors is not None
        keys, valid = survivors.index + self.past, survivors.valid
        earlier = self._earlier(layer)
        if earlier is not None:
            before, before_valid = (t if t is None else t.to(keys.device) for t in earlier)
            assert before is not None
            if before_valid is not None or valid is not None:
                if before_valid is None:
                    before_valid = torch.ones_like(before, dtype=torch.bool)
                valid = torch.cat([before_valid, survivors.all_valid], dim=1)
            keys = torch.cat([before, keys], dim=1)
        if self.cache is not None and layer < len(self.cache.layers):
            if isinstance(self.cache.layers[layer], StaticLayer):
                # A static cache is as wide as its mask; its free slots are hidden.
                free = mask_width - keys.shape[1]
                keys = torch.nn.functional.pad(keys, (0, free), value=-1)
                if valid is not None:
                    valid = torch.nn.functional.pad(valid, (0, free), value=False)
        return keys, valid

    def _earlier(self, layer: int) -> tuple[Tensor, Tensor | None] | None:
        if self.cache is None or self.past == 0:
            return None
        return stored_positions(self.cache, layer, self.layout.position.shape[0])

    def _mark_cache(self, cache: Cache, layer: int) -> None:
        """Tell the layer's cache which positions its keys will stand for."""
        survivors = self.survivors
        assert survivors is not None
        keys, valid = survivors.index + self.past, survivors.valid
        if self.past:
            keys, valid = self._key_positions(layer, 0)
        adopt(cache, layer).prune(keys, valid, self.total)

    # -- giving back the public shape -------------------------------------------------------------

    def at(self, layer: int) -> Survivors | None:
        """The survivors that entered a layer; None before the first pruning."""
        done = [idx for idx in self.records if idx <= layer]
        return self.records[max(done)].survivors if done else None

    def kept(self, layer: int) -> Tensor:
        """(B, L) bool: tokens that entered ``layer``, in their original positions; padding False."""
        survivors = self.at(layer)
        if survivors is not None:
            return survivors.mask(self.layout.length)
        if self.attended is not None:
            return self.attended
        position = self.layout.position
        return position.new_ones(position.shape[0], self.layout.length, dtype=torch.bool)

    def restore_hidden(self, hidden: Tensor, layer: int) -> Tensor:
        """(B, n, D) -> (B, L, D): survivors of ``layer`` in their places, zeros elsewhere."""
        survivors = self.at(layer)
        if survivors is None:
            return hidden
        here = survivors.to(hidden.device)
        return scatter_tokens(hidden, here.index, here.all_valid, self.layout.length)

    def restore_attention(self, weights: Tensor, layer: int) -> Tensor:
        """(B, H, n, n) -> (B, H, L, L) attention weights of ``layer``, zeros at pruned places."""
        if self.at(layer) is None or weights.ndim != 4:
            return weights
        rows = self.restore_hidden(weights.transpose(1, 2), layer).transpose(1, 2)
        if self.past:
            return rows
        columns = self.restore_hidden(rows.permute(0, 3, 1, 2), layer)
        return columns.permute(0, 2, 3, 1)

