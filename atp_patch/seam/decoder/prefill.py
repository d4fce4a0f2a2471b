"""The state of one forward pass with images through the decoder.

It travels with the forward pass itself, as a keyword that the decoder hands to its layers. So
nothing of a pass is kept on the model, and gradient checkpointing replays the same choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from atp_patch.contract import Decision, Layout, View
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.maths import gather_tokens
from atp_patch.seam.decoder.decode import Decode
from atp_patch.seam.decoder.host_pass import HostPass
from atp_patch.seam.decoder.late_features import LateFeatures
from atp_patch.seam.decoder.restoring import restored
from atp_patch.seam.decoder.rope_2d import RowColumnRotary
from atp_patch.seam.decoder.streams import by_stream, first_stream
from atp_patch.seam.decoder.survivors import Survivors
from atp_patch.seam.decoder.views import view_before
from atp_patch.seam.decoder.visual_tokens import Learned, TokenState
from atp_patch.seam.host.cache import cache_in
from atp_patch.seam.host.prompt import TextRows
from atp_patch.seam.host.recorder import ATTEND, Recorder, Recording
from atp_patch.seam.host.temperature import QUERY_FACTOR


class LayerPolicy(Protocol):
    """What the rest of the package says about pruning before the decoder's layers.

    Attributes:
        layers: the pruning layers.
        attention_layers: pruning layer -> the numbers of the earlier layers whose attention the
            method sees there, each with the number of the layer that is read for it: itself, or
            the last one before it that attends.
        view_minimums: the fields of a view that say how many tokens are kept at least, by name.
    """

    layers: tuple[int, ...]
    attention_layers: Mapping[int, Mapping[int, int]]
    view_minimums: dict[str, int]

    def counts(
        self, step: int, layout: Layout, entered: tuple[int, ...], left: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """Return how many visual tokens the budget leaves each sample at a pruning layer.

        The result is None without a budget.

        Args:
            step: the number of the pruning layer, from 0.
            layout: the visual tokens before any pruning.
            entered: how many visual tokens of each sample entered the decoder.
            left: how many visual tokens of each sample are left.
        """

    def decide(self, view: View) -> Decision:
        """Ask the method for its decision."""

    def finished(self, prefill: Prefill) -> None:
        """Take note of a forward pass with images that has gone through the decoder."""

    def losses(
        self, prefill: Prefill, learned: Learned, output: Any
    ) -> dict[str, tuple[float, Tensor]]:
        """Return what training adds to the loss of the host's output: name -> (weight, scalar)."""


@dataclass
class Prefill:
    """One forward pass with images through the decoder of a patched model.

    Attributes:
        policy: what the rest of the package says about pruning; it makes the decisions.
        recorder: the object that records the attention that decisions need.
        tokens: the visual tokens that are left.
        text: where the text rows lie.
        prompt_tokens: how many tokens each sample has without padding.
        host: what the host brought to this pass.
        embeds: (B, L, D), what enters the decoder.
        late: the features that are added before some layers; None where there are none.
        entry: the decision about the visual tokens that enter the decoder; None where all do.
        rotary: the rotary tables by row and column; None where the host's tables are kept.
        known: layer -> the decision of the first pass of a generation without a cache, filled by
            that pass; None where a cache holds the choice.
        recordings: layer -> its attention, until the decisions that need it are made.
        state: what the method keeps from one pruning layer to the next.
        entered: how many visual tokens of each sample entered the decoder.
        enters_last: (B, L', D), what enters the layers that reuse keys of earlier ones, before the
            host cuts it to the last tokens; None until then, and without such layers.
        rows: how many of the last tokens enter the layers that reuse keys, where the host has cut
            the sequence to them; None where it has not.
    """

    policy: LayerPolicy
    recorder: Recorder
    tokens: TokenState
    text: TextRows
    prompt_tokens: tuple[int, ...]
    host: HostPass
    embeds: Tensor
    entry: Decision | None
    rotary: RowColumnRotary | None
    known: dict[int, Decision] | None
    late: LateFeatures | None = None
    recordings: dict[int, Recording] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    entered: tuple[int, ...] = field(init=False)
    enters_last: Tensor | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.entry is not None:
            self._carry_out(0, self.entry)
        self.entered = self.tokens.visual.left

    @property
    def layout(self) -> Layout:
        """The visual tokens before any pruning."""
        return self.tokens.visual.layout

    # -- before and behind the layers -------------------------------------------------------------

    def before_layer(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Return the layer's arguments, and change its keywords in place."""
        (hidden,) = args
        if self.late is not None:
            hidden = self.late.added(layer, hidden)
        if layer in self.policy.layers:
            self._prune(layer, hidden)
        hidden = self._narrow_hidden(layer, hidden, kwargs)
        self._narrow_kwargs(layer, hidden, kwargs)
        attend = self.tokens.attention_in(layer, hidden.device)
        if attend is not None:
            kwargs[ATTEND] = attend
        sink = None
        if self._is_scored(layer):
            sink = partial(self.recordings.__setitem__, layer)
        factor = self._query_factor(layer, getattr(module, "self_attn", None), kwargs)
        if factor is not None:
            kwargs[QUERY_FACTOR] = factor.to(hidden.device)
        if sink is not None or factor is not None:
            tables = kwargs.get("position_embeddings")
            if "position_embeddings" in kwargs and tables is None:  # this layer rotates nothing
                tables = ()
            self.recorder.expect(module.self_attn, sink, rotary=tables)
        return (hidden,)

    def enters_reused_keys(self, hidden: Tensor) -> None:
        """Take note of what enters the layers that reuse keys, (B, L', D)."""
        self.enters_last = hidden

    def finish(self, output: Any, kwargs: dict[str, Any], num_layers: int) -> Any:
        """Report what the pass did, and give the decoder's output the public length.

        None leaves the output as it is.
        """
        self.policy.finished(self)
        survivors = self.tokens.entering(num_layers - 1)
        if self.rows is not None and survivors is not None:
            return self._cut(output, survivors, self.rows)
        host = self.host
        held = host.held if host.past else None
        return restored(output, self.tokens, num_layers, host.attending, held)

    def without_output(self) -> Tensor | None:
        """Return (B, L) bool: the places that have no output of their own, or None where all have
        one.
        """
        return self.tokens.without_output()

    def losses(self, output: Any) -> dict[str, tuple[float, Tensor]]:
        """Return what training adds to the loss: name -> (weight, scalar)."""
        learned = self.tokens.learned()
        return {} if learned is None else self.policy.losses(self, learned, output)

    # -- pruning ----------------------------------------------------------------------------------

    def _prune(self, layer: int, hidden: Tensor) -> None:
        """Decide which tokens enter ``layer``, and drop the others."""
        if layer in self.tokens.choices:  # a replay by gradient checkpointing
            return
        # The prompt is the same in every pass of a generation without a cache.
        decision = None if self.known is None else self.known.get(layer)
        if decision is None and not self._needs_decision(layer):
            return  # the budget keeps everything, so nothing was recorded and nothing changes
        # A checkpoint around the layer counts the tensors that its replay saves, and a replay makes
        # no choice. So what the thresholds learn from is saved outside of the checkpoint.
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            if decision is None:
                decision = self._decide(layer, hidden)
            self._carry_out(layer, decision)
        wanted = {
            number
            for later, numbers in self.policy.attention_layers.items()
            for number in numbers.values()
            if later > layer
        }
        for number in set(self.recordings) - wanted:
            del self.recordings[number]

    def _carry_out(self, layer: int, decision: Decision) -> None:
        self.tokens.apply(layer, decision)
        if self.late is not None:
            self.late.follow(layer, self.tokens)
        if self.known is not None:
            self.known.setdefault(layer, decision)

    def _decide(self, layer: int, hidden: Tensor) -> Decision:
        sources = self.policy.attention_layers[layer]
        wanted = set(sources.values())
        missing = [number for number in wanted if number not in self.recordings]
        if missing:
            raise UnsupportedModelError(
                f"layers {missing} of this decoder have no attention that can be recorded, and the "
                f"method asks for it before layer {layer}; it must ask for other attention_layers."
            )
        device = self.recordings[max(wanted)].query.device if wanted else hidden.device
        recordings = {number: self.recordings[number].to(device) for number in wanted}
        self._move_to(device)
        # Scores are compared with each other, so autocast must not round them.
        with (
            torch.set_grad_enabled(self.tokens.learning),
            torch.autocast(hidden.device.type, enabled=False),
        ):
            view = view_before(
                layer,
                self.tokens,
                self.text,
                self.host,
                {number: (of, recordings[of]) for number, of in sources.items()},
                first_stream(hidden),
                step=self.policy.layers.index(layer),
                counts=self._counts(layer),
                embeds=self.embeds.to(device),
                state=self.state,
                **self.policy.view_minimums,
            )
            return self.policy.decide(view)

    def _is_scored(self, layer: int) -> bool:
        """Return whether a decision that is still to be made looks at the attention of a layer."""
        return any(
            later > layer and layer in numbers.values() and self._needs_decision(later)
            for later, numbers in self.policy.attention_layers.items()
        )

    def _needs_decision(self, layer: int) -> bool:
        if layer in self.tokens.choices or (self.known is not None and layer in self.known):
            return False
        counts = self._counts(layer)
        return counts is None or counts != self.tokens.visual.left

    def _counts(self, layer: int) -> tuple[int, ...] | None:
        step, left = self.policy.layers.index(layer), self.tokens.visual.left
        return self.policy.counts(step, self.layout, self.entered, left)

    def _move_to(self, device: torch.device) -> None:
        """Move the state to the device of the layer that was recorded.

        The layers of one model may lie on several devices.
        """
        if self.layout.position.device != device:
            self.tokens.move_to(device)
            self.text = self.text.to(device)

    # -- what the host hands to a layer -----------------------------------------------------------

    def _narrow_hidden(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return the hidden states of the tokens that enter a layer.

        In front of layers that reuse keys, the host may cut everything to the last tokens of the
        sequence, for which alone it wants logits. Of hidden states that it takes for whole, it
        cuts the last survivors instead, so the right ones are taken here.
        """
        survivors, whole, self.enters_last = self.tokens.entering(layer), self.enters_last, None
        length = self.layout.length
        if whole is not None:
            rows = kwargs["position_embeddings"][0].shape[-2]
            if rows < length:
                self.rows = rows
                if survivors is None:
                    return hidden
                slot = survivors.columns(length)[:, -rows:].clamp(min=0)
                return gather_tokens(whole, slot.to(whole.device))

        def narrowed(states: Tensor) -> Tensor:
            if layer:  # the embeddings at the door have been merged
                states = self.tokens.merged(layer, states)
            return self.tokens.narrow_hidden(layer, states)

        return by_stream(narrowed, hidden)

    def _narrow_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        host, survivors = self.host, self.tokens.entering(layer)
        if survivors is not None and self.rows is not None:
            host.narrow_columns(layer, survivors, kwargs)
            return
        if self.rotary is not None and layer in self.host.attending:
            kwargs["position_embeddings"] = self.rotary.tables(kwargs.get("position_embeddings"))
        if survivors is not None:
            host.narrow_kwargs(layer, survivors, kwargs)
        elif host.cache is not None and host.past:
            decode = Decode(host.cache, host.flash, host.key_layers, host.attending)
            decode.narrow_kwargs(layer, hidden.shape[-2], kwargs)

    def _query_factor(self, layer: int, attention: Any, kwargs: dict[str, Any]) -> Tensor | None:
        survivors = self.tokens.entering(layer)
        if survivors is None:
            return None
        return self.host.query_factor(attention, survivors, cache_in(kwargs))

    def _cut(self, output: Any, survivors: Survivors, rows: int) -> Any:
        """Return the output of the last ``rows`` tokens, with zeros at pruned places."""
        alive = survivors.mask(self.layout.length)[:, -rows:, None]

        def zeroed(states: Tensor) -> Tensor:
            return states.masked_fill(~alive.to(states.device), 0)

        if isinstance(output, tuple):
            return (zeroed(output[0]), *output[1:])
        output.last_hidden_state = zeroed(output.last_hidden_state)
        return output


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
