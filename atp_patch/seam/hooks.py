"""The seam: hooks on a loaded model that let a method drop visual tokens between decoder layers.

Hooks are bound methods of one object that the model carries, so copies and pickles of a patched
model are patched models of their own. What belongs to one forward pass travels with it as the
keyword ``RUN`` that the decoder hands on to its layers; what belongs to a conversation lives in its
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from atp_patch.contract import Decision, View
from atp_patch.seam.decoder.decode import Decode
from atp_patch.seam.decoder.prefill import Prefill
from atp_patch.seam.door.entry import Reader, begin
from atp_patch.seam.door.tombstones import without_tombstones
from atp_patch.seam.host import recorder
from atp_patch.seam.host.cache import pruned_layer
from atp_patch.seam.host.inputs import Call, refuse_replica
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.masks import check_implementation, is_flash
from atp_patch.seam.host.outside import Outside
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.recorder import ATTEND, Recorder
from atp_patch.seam.host.replaced import Replaced
from atp_patch.seam.host.session import Session
from atp_patch.seam.learning.learning_pass import LearningPass
from atp_patch.seam.learning.weighted import weighted_attention
from atp_patch.seam.tower.merging import VisionHooks
from atp_patch.seam.tower.reading import ReadingHooks
from atp_patch.seam.tower.videos import Videos

RUN = "atp_patch_run"


class Pruner(Reader, Protocol):
    """What the seam asks of the rest of the package."""

    minimum: dict[str, int]

    def vision_hooks(self, active: Callable[[], bool], recorder: Recorder) -> VisionHooks | None:
        """What hooks into the vision tower, or None."""

    def counts(self, step: int, run: Prefill) -> tuple[int, ...] | None:
        """How many visual tokens the budget leaves each sample, or None without a budget."""

    def decide(self, view: View) -> Decision:
        """The method's choice."""

    def finished(self, run: Prefill) -> None:
        """A forward pass with images is through the decoder."""

    def losses(self, run: LearningPass, output: Any) -> dict[str, tuple[float, Tensor]]:
        """What training adds to the loss of the host's output: name -> its weight and a scalar."""


class ThreadState(PerThread):
    """What the running thread does with one patched model.

    Attributes:
        disabled: contexts of ``disabled(model)`` that the thread is in.
        session: the call of ``generate`` that it is in.
        call: the forward pass that it is in.
    """

    def __init__(self) -> None:
        self.disabled = 0
        self.session: Session | None = None
        self.call: Call | None = None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class LayerHook:
    """Forward pre-hook of one decoder layer."""

    def __init__(self, seam: Seam, layer: int) -> None:
        self.seam, self.layer = seam, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Narrow what the layer gets, prune before it, record its attention: whatever is due."""
        run = kwargs.pop(RUN, None)
        if run is None:
            return None
        if isinstance(run, Prefill):
            args = self.seam.before_layer(self.layer, run, args, kwargs)
        elif isinstance(run, Decode):
            run.narrow_kwargs(self.layer, args[0].shape[1], kwargs)
        return args, kwargs


class Seam:
    """Everything that patching adds to one model; ``install`` and ``remove`` are exact inverses."""

    def __init__(self, parts: Parts, pruner: Pruner) -> None:
        self.parts, self.pruner, self.outside = parts, pruner, Outside(parts)
        self.thread, self.recorder = ThreadState(), Recorder()
        self.vision = pruner.vision_hooks(self._in_pass, self.recorder)
        self.reader = self.vision if isinstance(self.vision, ReadingHooks) else None
        self._handles: list[Any] = []
        self._generate: Replaced | None = None
        self.videos = Videos(parts.base)

    def install(self) -> None:
        """Register the hooks, and a ``generate`` that knows where the prompt ends."""
        recorder.register()
        parts, add = self.parts, self._handles.append
        if parts.top is not parts.base:
            add(parts.top.register_forward_pre_hook(self._before_top, with_kwargs=True))
            add(parts.top.register_forward_hook(self._after, always_call=True))
        add(parts.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        add(parts.base.register_forward_hook(self._after, always_call=True))
        add(parts.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        add(parts.decoder.register_forward_hook(self._after_decoder, with_kwargs=True))
        for idx, layer in enumerate(parts.layers):
            before_layer = LayerHook(self, idx)
            add(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            self.recorder.watch(layer.self_attn)
            if self.pruner.learned:
                hook = self._before_attention
                add(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
        if self.vision is not None:
            self.vision.install(add)
            self.videos.install()
        self.outside.install()
        if hasattr(parts.top, "generate"):
            self._generate = Replaced(parts.top, "generate", self.generate)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A patched model that is unpickled needs its attention function known in that process."""
        self.__dict__.update(state)
        recorder.register()

    def remove(self) -> None:
        """Take everything back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._generate is not None:
            self._generate.restore()
        self.videos.remove()
        self.outside.remove()
        if self.vision is not None:
            self.vision.remove()
        for layer in self.parts.layers:
            self.recorder.release(layer.self_attn)

    @property
    def enabled(self) -> bool:
        """Whether the running thread is in no context of ``disabled(model)``."""
        return not self.thread.disabled

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The host's ``generate``; it tells the forward passes within where the prompt ends."""
        outer = self.thread.session
        if self.enabled:
            self.thread.session = Session.of_generate(self.outside, args, kwargs)
            if self.reader is not None:
                self.reader.forget()
        for name in ("visual_mask", "visual_grids"):
            kwargs.pop(name, None)
        assert self._generate is not None
        try:
            return self._generate.original(*args, **kwargs)
        finally:
            self.thread.session = outer

    @contextmanager
    def reading(self, prompt_ids: Tensor) -> Iterator[None]:
        """The model's ``get_image_features`` gives what a pass over these prompts (B, L) would find
        in their images: merged, with tombstones where tokens are dropped.
        """
        outer, self.thread.session = (
            self.thread.session,
            Session(prompt_ids.shape[1], ids=prompt_ids),
        )
        try:
            yield
        finally:
            self.thread.session = outer

    def _in_pass(self) -> bool:
        """Whether the vision tower runs for a pass that is to be pruned."""
        return self.enabled and (self.thread.call is not None or self.thread.session is not None)

    @property
    def prompt_ids(self) -> Tensor | None:
        """(B, L) ids of the prompt whose images are being read, where there are any."""
        call, session = self.thread.call, self.thread.session
        if call is not None and call.input_ids is not None:
            return call.input_ids
        return None if session is None else session.ids

    # -- hooks ------------------------------------------------------------------------------------

    def _before_top(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        refuse_replica(module)
        self._begin_call(args, kwargs)
        return args, kwargs

    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        refuse_replica(module)
        # One that has been here before was broken off: Ctrl-C runs no hook after it.
        call = self.thread.call
        if call is None or call.entered:
            call = self._begin_call(args, kwargs)
            call.alone = module is not self.parts.top
        call.with_base(module, args, kwargs)
        return args, kwargs

    def _begin_call(self, args: Any, kwargs: dict[str, Any]) -> Call:
        self.recorder.forget()
        call = Call.begin(self.outside, args, kwargs, self.thread.session)
        if self.reader is not None and self.thread.session is None:
            self.reader.forget()
        self.thread.call = call
        return call

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.recorder.forget()
        if self.pruner.before is not None and hasattr(output, "image_hidden_states"):
            output.image_hidden_states = without_tombstones(output.image_hidden_states)
        call = self.thread.call
        if module is not self.parts.top and not (call is not None and call.alone):
            return None
        self.thread.call = None
        if call is None or output is None or not isinstance(call.run, LearningPass):
            return None
        if call.labels is None:  # the loss is made elsewhere, without the thresholds' terms
            return None
        return call.add_losses(output, self.pruner.losses(call.run, output))

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self.begin(kwargs)
        return None if run is None else (args, {**kwargs, RUN: run})

    def begin(self, kwargs: dict[str, Any]) -> Prefill | Decode | None:
        """The pass that the decoder's arguments begin; None where it is the host's alone."""
        call, cache = self.thread.call, kwargs.get("past_key_values")
        implementation = self.parts.config._attn_implementation
        run: Prefill | None = None
        explicit = self.pruner.explicit
        if self.enabled and call is not None and (call.has_images or explicit):
            check_implementation(implementation)
            run = begin(self.parts, self.pruner, call, self.thread.session, kwargs, self.reader)
        if run is None and cache is not None and pruned_layer(cache, len(cache.layers) - 1):
            return Decode(cache, is_flash(implementation))
        return run

    def before_layer(
        self, layer: int, run: Prefill, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """What is due before one layer of a pass with images; returns the layer's arguments."""
        hidden, *rest = args
        layers = self.pruner.layers
        if layer in layers or layer == 0:
            self._prune(layer, run, hidden)
            hidden = run.narrow_hidden(layer, hidden)
        if run.places is not None:
            kwargs["position_embeddings"] = run.places.turned(kwargs.get("position_embeddings"))
        if run.entering(layer) is not None:
            run.narrow_kwargs(layer, kwargs)
        elif run.host.cache is not None and run.host.past:
            Decode(run.host.cache, run.host.flash).narrow_kwargs(layer, hidden.shape[1], kwargs)
        attention = self.parts.layers[layer].self_attn
        sink = run.record if layer + 1 in layers and self._needs_scores(layer + 1, run) else None
        run.rotary = kwargs.get("position_embeddings")
        weight = run.weight_in(layer) if isinstance(run, LearningPass) else None
        if weight is not None:
            kwargs[ATTEND] = partial(weighted_attention, weight=weight.to(hidden.device))
        if sink is not None:
            self.recorder.expect(attention, sink)
        return (hidden, *rest)

    def _before_attention(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A call of the attention that is to be weighed goes through our function. That this hook
        says so, not the layer's, holds where checkpointing replays a layer without its hooks.
        """
        if ATTEND in kwargs and not self.recorder.expects(module.config):
            self.recorder.expect(module, None)

    def _needs_scores(self, layer: int, run: Prefill) -> bool:
        if layer in run.records or (run.frozen is not None and layer in run.frozen):
            return False
        counts = self._counts(layer, run)
        return counts is None or counts != run.left

    def _counts(self, layer: int, run: Prefill) -> tuple[int, ...] | None:
        return self.pruner.counts(self.pruner.layers.index(layer), run)

    def _prune(self, layer: int, run: Prefill, hidden: Tensor) -> None:
        """Decide before ``layer`` who goes on."""
        if layer in run.records:  # a replay by gradient checkpointing
            return
        if layer == 0:
            run.enter()
            return
        counts = self._counts(layer, run)
        decision = run.frozen_decision(layer)
        if decision is None and run.recording is None:
            return  # the budget keeps everything: nothing was recorded, nothing changes
        # A checkpoint around the layer counts what its replay saves, and no choice is made in a
        # replay: what the thresholds learn from is kept beside it.
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            if decision is None:
                decision = self._decide(layer, run, hidden, counts)
            run.apply(layer, decision, counts)

    def _decide(
        self, layer: int, run: Prefill, hidden: Tensor, counts: tuple[int, ...] | None
    ) -> Decision:
        step = self.pruner.layers.index(layer)
        # Scores are compared with each other: no autocast rounds them.
        with (
            torch.set_grad_enabled(isinstance(run, LearningPass)),
            torch.autocast(hidden.device.type, enabled=False),
        ):
            return self.pruner.decide(run.view(layer, step, hidden, counts, **self.pruner.minimum))

    def _after_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        run = kwargs.get(RUN)
        return self.finish(run, output) if isinstance(run, Prefill) else None

    def finish(self, run: Prefill, output: Any) -> Any:
        """Note what a pass did, and give its output the public length; None leaves it as it is."""
        self.pruner.finished(run)
        call = self.thread.call
        if call is not None and (isinstance(run, LearningPass) or run.survivors is not None):
            call.unsupervise(run)
            call.run = run
        if run.survivors is None:
            return None
        return run.restore(output, len(self.parts.layers))
