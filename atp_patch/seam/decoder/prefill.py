"""The state of one forward pass that carries images: which tokens are left, layer by layer.

It travels with the forward pass itself, as a keyword that the decoder hands to its layers, so
nothing about a pass is kept on the model and gradient checkpointing replays the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract import Decision, Layout, Recycled, View
from atp_patch.maths import gather_tokens, pack, scatter_tokens
from atp_patch.seam.decoder.host_pass import HostPass
from atp_patch.seam.decoder.rope_2d import RotaryPlaces
from atp_patch.seam.decoder.survivors import Survivors
from atp_patch.seam.host.masks import scoring_mask
from atp_patch.seam.host.prompt import TextRows
from atp_patch.seam.host.recorder import Recording


@dataclass
class LayerRecord:
    """What one pruning layer did: the decision about the visual tokens that reached it.

    ``slot``: (B, V) their places among the tokens that reached it; ``survivors``: who is left.
    """

    decision: Decision
    token: Tensor
    token_valid: Tensor
    slot: Tensor
    kept: tuple[int, ...]
    survivors: Survivors | None


class Prefill:
    """One forward pass with images through the decoder of a patched model.

    Attributes:
        entry: (B, V) bool, the visual tokens that enter the decoder, None where all do.
        entered: how many they are, of each sample.
        embeds: (B, L, D) what enters the decoder.
        places: what turns visual tokens by row and column, where that is asked for.
        state: what the method keeps for its later pruning layers.
        rotary: tables (cos, sin) of the layer whose attention is to be recorded.
        gathers: layers run on survivors alone.

    Args:
        layout, text: where the visual tokens and the text rows lie.
        attended: (B, L) bool, False at padding; None without padding.
        token_counts: tokens of each sample, padding not counted.
        host: what the host brought to this pass.
        bytes_per_element: of the hidden states, and so of the cache.
        frozen: decisions of the first pass of a generation without a cache, filled by that pass;
            None where a cache holds the choice.
    """

    gathers = True

    def __init__(
        self,
        layout: Layout,
        text: TextRows,
        attended: Tensor | None,
        token_counts: Sequence[int],
        host: HostPass,
        bytes_per_element: int,
        frozen: dict[int, Decision] | None,
    ) -> None:
        self.layout, self.text, self.attended = layout, text, attended
        self.host, self.frozen, self.bytes_per_element = host, frozen, bytes_per_element
        self.prompt_tokens = tuple(token_counts)
        self.records: dict[int, LayerRecord] = {}
        self.survivors: Survivors | None = None
        self.entry: Tensor | None = None
        self.entered = layout.totals
        self.embeds: Tensor | None = None
        self.places: RotaryPlaces | None = None
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.recording: Recording | None = None
        self.state: dict[str, Any] = {}
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
        self.recording = replace(recording, rotary=self.rotary)

    def view(
        self,
        layer: int,
        step: int,
        hidden: Tensor,
        counts: tuple[int, ...] | None,
        **minimum: Any,
    ) -> View:
        """What a method may look at before ``layer``; takes the recording of the layer before."""
        recording = self.recording
        assert recording is not None, "the layer before a pruning layer was not recorded"
        self.recording = None
        query = recording.query
        self._move(query.device)
        keys = query.shape[2] + self.host.earlier_keys(layer - 1, query.shape[2])
        return View(
            layer=layer,
            step=step,
            query=query,
            key=recording.key[:, :, :keys],
            mask=scoring_mask(recording.mask, query.shape[2], keys, query.device),
            scaling=recording.scaling,
            softcap=recording.softcap,
            sinks=recording.sinks,
            hidden=hidden,
            slot=self._slots(self.layout.position.gather(1, self._token)),
            slot_valid=self._token_valid,
            token=self._token,
            text=self._slots(self.text.position),
            text_valid=self.text.valid,
            text_position=self.text.position,
            last=self._slots(self.text.last[:, None])[:, 0],
            layout=self.layout,
            counts=counts,
            sample_key=self.text.sample_key,
            **minimum,
            embeds=None if self.embeds is None else self.embeds.to(query.device),
            state=self.state,
            unrotated=replace(recording, key=recording.key[:, :, :keys]).unrotated,
        )

    def _move(self, device: torch.device) -> None:
        """Follow the decoder to the device of the layer that was recorded (a model may span
        several).
        """
        if self.layout.position.device == device:
            return
        self.layout, self.text = self.layout.to(device), self.text.to(device)
        self._token, self._token_valid = self._token.to(device), self._token_valid.to(device)
        if self.attended is not None:
            self.attended = self.attended.to(device)
        if self.survivors is not None:
            self.survivors = self.survivors.to(device)
            self.records[max(self.records)].survivors = self.survivors

    def frozen_decision(self, layer: int) -> Decision | None:
        """The choice of the first pass of a generation without a cache, or None.

        The prompt is the same in every pass, so the same tokens stand in the same columns.
        """
        return None if self.frozen is None else self.frozen.get(layer)

    def enter(self) -> bool:
        """Drop the visual tokens that do not enter the decoder (``entry``); False where all do."""
        if self.entry is None:
            return False
        changed = self.apply(0, Decision(self.entry, soft=self.entry.float()), None)
        self.entered = self.left
        return changed

    def choose_entry(self, decision: Decision) -> None:
        """Drop the visual tokens that a method at the door does not let in."""
        self.apply(0, decision, None)
        self.entered = self.left

    def apply(self, layer: int, decision: Decision, counts: tuple[int, ...] | None) -> bool:
        """Drop what the decision does not keep; False where everything stays and nothing
        changes.
        """
        keep = decision.keep.to(self._token_valid.device) & self._token_valid
        kept = keep.sum(1).tolist()
        slot = self._slots(self.layout.position.gather(1, self._token))
        record = LayerRecord(decision, self._token, self._token_valid, slot, tuple(kept), None)
        self.records[layer] = record
        changed = kept != self._left
        if changed:
            self._narrow_to(keep, kept)
        record.survivors = self.survivors
        if self.frozen is not None and layer not in self.frozen:
            self.frozen[layer] = decision
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

    # -- narrowing --------------------------------------------------------------------------------

    def entering(self, layer: int) -> Survivors | None:
        """The tokens that a layer runs on; None: all. Known again when the layer is replayed."""
        return self.at(layer) if self.gathers else None

    def narrow_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        """(B, L', D) hidden states of the tokens before a pruning layer -> those of its
        survivors.
        """
        record, before, after = self.records.get(layer), self.at(layer - 1), self.entering(layer)
        if record is None:
            return hidden
        if record.decision.recycled is not None:
            hidden = _recycle(hidden, record.slot, record.decision.recycled)
        if after is before or after is None:
            return hidden
        index = after.index
        if before is not None:
            index = before.slots(self.layout.length).gather(1, index.to(before.index.device))
        return gather_tokens(hidden, index.to(hidden.device))

    def narrow_kwargs(self, layer: int, kwargs: dict[str, Any]) -> None:
        """Replace what the host hands to a layer by what the survivors need (in place)."""
        survivors = self.entering(layer)
        assert survivors is not None
        self.host.narrow_kwargs(layer, survivors, kwargs)

    # -- giving back the public shape -------------------------------------------------------------

    def at(self, layer: int) -> Survivors | None:
        """The survivors that entered a layer; None before the first pruning."""
        done = [idx for idx in self.records if idx <= layer]
        return self.records[max(done)].survivors if done else None

    def kept(self, layer: int) -> Tensor:
        """(B, L) bool: tokens that entered ``layer``, in their original positions; padding
        False.
        """
        survivors = self.at(layer)
        if survivors is not None:
            return survivors.mask(self.layout.length)
        if self.attended is not None:
            return self.attended
        position = self.layout.position
        return position.new_ones(position.shape[0], self.layout.length, dtype=torch.bool)

    def restore(self, output: Any, num_layers: int) -> Any:
        """The decoder's output in the public length: zeros at pruned places."""
        length, square = self.layout.length, not self.host.past

        def hidden(states: Tensor, layer: int) -> Tensor:
            survivors = self.at(layer)
            return states if survivors is None else survivors.restore_hidden(states, length)

        def attention(weights: Tensor, layer: int) -> Tensor:
            survivors = self.at(layer)
            if survivors is None:
                return weights
            return survivors.restore_attention(weights, length, square=square)

        last = num_layers - 1
        if isinstance(output, tuple):
            return (hidden(output[0], last), *output[1:])
        output.last_hidden_state = hidden(output.last_hidden_state, last)
        if output.hidden_states is not None:
            # hidden_states[i] leaves layer i - 1; the first is what enters layer 0.
            output.hidden_states = tuple(
                hidden(h, max(i - 1, 0)) for i, h in enumerate(output.hidden_states)
            )
        if output.attentions is not None:
            output.attentions = tuple(attention(w, i) for i, w in enumerate(output.attentions))
        return output


def _recycle(hidden: Tensor, slot: Tensor, recycled: Recycled) -> Tensor:
    """(B, L', D) with sums of visual tokens' states in place of those that take in others."""
    slot, column = slot.to(hidden.device), recycled.column.to(hidden.device)
    valid, weight = recycled.valid.to(hidden.device), recycled.weight.to(hidden.device)
    made = weight @ gather_tokens(hidden, slot).float()
    place, length = slot.gather(1, column), hidden.shape[1]
    changed = scatter_tokens(valid, place, valid, length)
    table = scatter_tokens(made.to(hidden.dtype), place, valid, length)
    return torch.where(changed[..., None], table, hidden)
