"""Hooks on the decoder and its layers, which give each forward pass its state.

The state travels as the keyword ``PASS`` that the decoder hands on to its layers, so that nothing
of it is kept on the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from atp_patch.seam.decoder.decode import Decode
from atp_patch.seam.decoder.prefill import Prefill
from atp_patch.seam.door.entry import TowerOutputs, prefill_of
from atp_patch.seam.host.cache import cache_in, pruned_layer
from atp_patch.seam.host.embedding import embedded, embeds_itself
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.masks import check_implementation, is_flash
from atp_patch.seam.host.recorder import ATTEND, Recorder
from atp_patch.seam.policy import Policy
from atp_patch.seam.thread_state import ThreadState
from atp_patch.seam.voco.voco_pass import voco_pass_of

PASS = "atp_patch_pass"


class DecoderPass(Protocol):
    """The state of one forward pass through the decoder."""

    def before_layer(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Return the layer's arguments, and change its keywords in place."""

    def finish(self, output: Any, kwargs: dict[str, Any], num_layers: int) -> Any:
        """Return the decoder's output in the public length, or None, which leaves it as it is.

        Args:
            output: what the decoder returned.
            kwargs: what the decoder was given.
            num_layers: how many layers the decoder has.
        """

    def without_output(self) -> Tensor | None:
        """Return (B, L) bool: the places that have no output of their own, or None where all have
        one.
        """

    def losses(self, output: Any) -> dict[str, tuple[float, Tensor]]:
        """Return what training adds to the loss of the model's output: name -> (weight, scalar)."""


class Carrier:
    """Holds the state of a pass among the decoder's keywords.

    FSDP makes lists, dicts and dataclasses among a module's arguments anew, and would give each
    layer a copy of the state by itself. It leaves other objects as they are.
    """

    __slots__ = ("decoder_pass",)

    def __init__(self, decoder_pass: DecoderPass) -> None:
        self.decoder_pass = decoder_pass


class LayerHook:
    """The forward pre-hook of one decoder layer."""

    def __init__(self, hooks: DecoderHooks, layer: int, module: nn.Module) -> None:
        self.hooks, self.layer = hooks, layer
        # The names of the arguments behind the hidden states, which may come without them.
        self.names = tuple(inspect.signature(type(module).forward).parameters)[2:]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the pass change the layer's arguments, where the keywords hold one."""
        carrier: Carrier | None = kwargs.pop(PASS, None)
        if carrier is None:
            return None
        decoder_pass = carrier.decoder_pass
        kwargs.update(zip(self.names, args[1:], strict=False))
        args = args[:1]
        return self.hooks.before_layer(decoder_pass, self.layer, module, args, kwargs), kwargs


class DecoderHooks:
    """Hooks that give each forward pass through the decoder its state.

    Args:
        parts: the model's modules.
        policy: what the rest of the package says about pruning.
        thread: what the running thread is doing with the model.
        recorder: records the attention of the layers.
        tower_outputs: reads the vision tower for a method at the door, or None.
    """

    def __init__(
        self,
        parts: Parts,
        policy: Policy,
        thread: ThreadState,
        recorder: Recorder,
        tower_outputs: TowerOutputs | None,
    ) -> None:
        self.parts, self.policy, self.thread = parts, policy, thread
        self.recorder, self.tower_outputs = recorder, tower_outputs

    def install(self, add: Callable[[Any], None]) -> None:
        """Register the hooks; ``add`` takes their handles."""
        decoder = self.parts.decoder
        add(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        add(decoder.register_forward_hook(self._after_decoder, with_kwargs=True))
        for number, layer in enumerate(self.parts.layers):
            before_layer = LayerHook(self, number, layer)
            add(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            if number not in self.parts.attending:
                continue
            self.recorder.watch(layer.self_attn)
            if number == self.parts.first_reusing_layer - 1:
                add(layer.register_forward_hook(self._before_reused_keys))
            if self.policy.learned:
                before = self._before_attention
                add(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))

    def remove(self) -> None:
        """Undo what ``install`` has changed besides hooks."""
        for number in self.parts.attending:
            self.recorder.release(self.parts.layers[number].self_attn)

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = self.thread.call
        if self.thread.enabled and call is not None and call.has_images and embeds_itself(module):
            kwargs = embedded(module, kwargs)
        made = self.pass_of(kwargs)
        if made is None:
            return None
        decoder_pass, kwargs = made
        return args, {**kwargs, PASS: Carrier(decoder_pass)}

    def pass_of(self, kwargs: dict[str, Any]) -> tuple[DecoderPass, dict[str, Any]] | None:
        """Return the state of a new pass with these arguments, and the arguments of the decoder.

        The result is None where the host runs the pass without us.

        Args:
            kwargs: the arguments that the host gives the decoder.
        """
        call, cache = self.thread.call, cache_in(kwargs)
        implementation = self.parts.config._attn_implementation
        explicit, voco = self.policy.explicit, self.policy.voco
        if self.thread.enabled and call is not None and (call.has_images or explicit):
            if voco is not None:
                compressing = voco_pass_of(self.parts, self.policy, voco, call, kwargs)
                if compressing is not None:
                    return compressing
            else:
                check_implementation(implementation)
                session = self.thread.session
                prefill = prefill_of(
                    self.parts,
                    self.policy,
                    self.recorder,
                    self.tower_outputs,
                    call,
                    session,
                    kwargs,
                )
                if prefill is not None:
                    return prefill, kwargs
        keys = self.parts.key_layers
        if cache is not None and pruned_layer(cache, keys[self.parts.attending[-1]]):
            return Decode(cache, is_flash(implementation), keys, self.parts.attending), kwargs
        return None

    def before_layer(
        self,
        decoder_pass: DecoderPass,
        layer: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, ...]:
        """Return the layer's arguments, and change its keywords in place."""
        if layer == self.parts.first_reusing_layer - 1:
            self.thread.entering = decoder_pass
        return decoder_pass.before_layer(layer, module, args, kwargs)

    def _before_reused_keys(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let the pass see what enters the layers that reuse keys, before the host cuts it."""
        decoder_pass, self.thread.entering = self.thread.entering, None
        if isinstance(decoder_pass, Prefill):
            decoder_pass.enters_reused_keys(output)

    def _before_attention(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Send a call of the attention that is to be weighed through our function.

        This is a hook of the attention, and not of its layer, because checkpointing replays a layer
        without the layer's own hooks.
        """
        if ATTEND in kwargs and not self.recorder.expects(module.config):
            self.recorder.expect(module, None)

    def _after_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        carrier: Carrier | None = kwargs.get(PASS)
        return None if carrier is None else self.finish(carrier.decoder_pass, output, kwargs)

    def finish(self, decoder_pass: DecoderPass, output: Any, kwargs: dict[str, Any]) -> Any:
        """Return the decoder's output in the public length, or None, which leaves it as it is.

        Labels at places without an output of their own are dropped.
        """
        output = decoder_pass.finish(output, kwargs, len(self.parts.layers))
        call, lost = self.thread.call, decoder_pass.without_output()
        if call is not None and lost is not None:
            call.behind_decoder(decoder_pass, lost)
        return output
