"""Hooks on the model and on the model without its head, where a forward pass begins and ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from atp_patch.seam.door.tombstones import clear_outputs
from atp_patch.seam.host.call import Call, refuse_replica
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.outside import Outside
from atp_patch.seam.host.recorder import Recorder
from atp_patch.seam.host.replaced import Replaced
from atp_patch.seam.host.session import Session
from atp_patch.seam.thread_state import ThreadState
from atp_patch.seam.tower.merging import VisionHooks


class ModelHooks:
    """Hooks that read the arguments of a forward pass and add the method's losses to its loss."""

    def __init__(
        self,
        parts: Parts,
        thread: ThreadState,
        recorder: Recorder,
        vision: VisionHooks | None,
        *,
        leaves_tombstones: bool,
    ) -> None:
        self.parts, self.thread, self.recorder = parts, thread, recorder
        self.vision, self.leaves_tombstones = vision, leaves_tombstones
        self.outside = Outside(parts)
        self._generate: Replaced | None = None

    def install(self, add: Callable[[Any], None]) -> None:
        """Register the hooks, and a ``generate`` that knows where the prompt ends; ``add`` takes
        the hooks' handles.
        """
        parts = self.parts
        if parts.top is not parts.base:
            add(parts.top.register_forward_pre_hook(self._before_top, with_kwargs=True))
            add(parts.top.register_forward_hook(self._after, always_call=True))
        add(parts.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        add(parts.base.register_forward_hook(self._after, always_call=True))
        self.outside.install()
        if hasattr(parts.top, "generate"):
            self._generate = Replaced(parts.top, "generate", _Generate(self))

    @property
    def generate_signature(self) -> inspect.Signature:
        """The signature of the host's ``generate``."""
        assert self._generate is not None
        return inspect.signature(self._generate.original)

    def remove(self) -> None:
        """Undo what ``install`` has changed besides hooks."""
        if self._generate is not None:
            self._generate.restore()
        self.outside.remove()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the host's ``generate`` and tell the forward passes within where the prompt ends."""
        outer = self.thread.session
        if self.thread.enabled:
            self.thread.session = Session.of_generate(self.outside, args, kwargs)
            self._forget_vision()
        for name in ("visual_mask", "visual_grids"):
            kwargs.pop(name, None)
        assert self._generate is not None
        try:
            return self._generate.original(*args, **kwargs)
        finally:
            self.thread.session = outer
            # Ctrl-C skips the hooks behind a module, which forget what a pass has left.
            self.thread.end_pass()
            self.recorder.forget()
            self._forget_vision()

    def _forget_vision(self) -> None:
        """Drop what the vision tower showed to a pass or a call of ``generate``."""
        if self.vision is not None:
            self.vision.forget()

    # Not compiled: it computes nothing, and would be compiled anew for each length of a prompt.
    @torch.compiler.disable
    def _before_top(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        refuse_replica(module)
        self._open_call(args, kwargs)
        return args, kwargs

    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        refuse_replica(module)
        # A call that has entered before was broken off, since Ctrl-C skips the hooks behind it.
        call = self.thread.call
        if call is None or call.entered:
            call = self._open_call(args, kwargs, alone=module is not self.parts.top)
        call.with_base(module, args, kwargs)
        return args, kwargs

    def _open_call(self, args: Any, kwargs: dict[str, Any], *, alone: bool = False) -> Call:
        self.recorder.forget()
        session = self.thread.session
        call = Call.of_outermost(self.outside, args, kwargs, session, alone=alone)
        if session is None:
            self._forget_vision()
        self.thread.call = call
        return call

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.recorder.forget()
        if self.leaves_tombstones:
            clear_outputs(output)
        call = self.thread.call
        if module is not self.parts.top and not (call is not None and call.alone):
            return None
        self.thread.end_pass()
        if call is None or output is None or call.through is None:
            return None
        if call.labels is None:  # the caller makes the loss, without the method's terms
            return None
        return call.add_losses(output, call.through.losses(output))


class _Generate:
    """Stands in for the host's ``generate``, and shows its signature."""

    __name__ = "generate"

    def __init__(self, hooks: ModelHooks) -> None:
        self.hooks = hooks

    @property
    def __signature__(self) -> inspect.Signature:
        return self.hooks.generate_signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        return self.hooks.generate(*args, **kwargs)
