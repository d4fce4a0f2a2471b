"""Recording the post-rotary queries and keys of one layer, whatever its attention implementation.

transformers finds the attention function at every call by the name in ``self_attn.config``. A
watched attention has a view of the host's config in its place. The view shares all attributes of
the host's config, but gives our function's name while the running thread expects a call of this
attention. Our function notes q and k and calls the host's function, which reads the host's name
again. The decoder's own config, from which masks are made, is never changed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.rotation import Tables, rotated_back
from atp_patch.seam.host.temperature import QUERY_FACTOR

ATTENTION_NAME = "atp_patch_record"
ATTEND = "atp_patch_attend"


@dataclass
class Recording:
    """What was recorded of one call of an attention.

    Attributes:
        query, key: (B, H, Q, d) and (B, Hk, K, d), after rotary embedding.
        mask: the host's mask, or None.
        scaling: the factor of the logits.
        module: the attention.
        rotary: the tables (cos, sin), or one of complex numbers, that the attention's layer was
            given; empty where it was given none; None where they are unknown.
        softcap: the bound of the logits (Gemma 2), or None.
        sinks: (H,) float, a logit of each head that counts in the sums of its softmax and for no
            token (gpt-oss), or None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    module: Any = None
    rotary: Tables | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def to(self, device: torch.device) -> Recording:
        """Return the same recording on another device (a model may span several)."""
        if self.query.device == device:
            return self
        moved = {
            name: value.to(device)
            for name in ("query", "key", "mask", "sinks")
            if (value := getattr(self, name)) is not None
        }
        tables: Any = self.rotary
        if isinstance(tables, Tensor):
            tables = tables.to(device)
        elif tables is not None:
            tables = tuple(table.to(device) for table in tables)
        return replace(self, **moved, rotary=tables)

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Return the queries and keys of this pass's own tokens before rotary embedding.

        Raises:
            UnsupportedModelError: where the rotary embedding cannot be undone.
        """
        own = self.key[:, :, -self.query.shape[2] :]
        return rotated_back(self.module, self.rotary, self.query, own)


def register() -> None:
    """Register our attention function in transformers; a second call changes nothing.

    This is done when a model is patched, never at import.
    """
    AttentionInterface.register(ATTENTION_NAME, _attend)


@dataclass(frozen=True)
class _Expected:
    """A call of an attention that a thread expects.

    Attributes:
        view: the attention's config.
        sink: the function that is given the recording, or None where none is wanted.
        rotary: the rotary tables that the attention's layer was given.
        every: True where all calls of the attention function are recorded until the module returns,
            because some vision towers attend image by image.
    """

    view: Any
    sink: Callable[[Recording], None] | None
    rotary: Any = None
    every: bool = False


class _Expectation(PerThread):
    """The call that the running thread expects, or None."""

    def __init__(self) -> None:
        self.call: _Expected | None = None


class Recorder:
    """Records the attention of one model's modules, for each thread by itself."""

    def __init__(self) -> None:
        self._thread = _Expectation()

    def watch(self, attention: Any) -> None:
        """Make a module's attention one that can be recorded, until :meth:`release`."""
        attention.config = _viewed(attention.config, self)

    def release(self, attention: Any) -> None:
        """Give a watched module its own config back."""
        if isinstance(attention.config, _View):
            attention.config = attention.config._atp_host

    def expect(
        self,
        attention: Any,
        sink: Callable[[Recording], None] | None,
        *,
        rotary: Any = None,
        every: bool = False,
    ) -> None:
        """Send the next call of a watched module through our function.

        The function hands what it records to ``sink``. It attends with the function in the keyword
        ``ATTEND`` of that call, if there is one.

        Args:
            attention: the module.
            sink: the function that is given the recording, or None.
            rotary: the rotary tables that the attention's layer was given.
            every: record all calls until :meth:`forget`, which is called when the module returns.
        """
        self._thread.call = _Expected(attention.config, sink, rotary, every)

    def forget(self) -> None:
        """Let the running thread expect no call."""
        self._thread.call = None

    def expects(self, view: Any) -> bool:
        """Return whether the running thread expects a call of the module with this config."""
        call = self._thread.call
        return call is not None and call.view is view

    def awaits(self, attention: Any) -> bool:
        """Return whether the next call of a module is to be recorded."""
        call = self._thread.call
        return call is not None and call.view is attention.config and call.sink is not None

    def add_sink(self, sink: Callable[[Recording], None]) -> None:
        """Hand the recording of the expected call to ``sink`` too."""
        call = self._awaited()

        def both(recording: Recording) -> None:
            sink(recording)
            call.sink(recording)

        self._thread.call = replace(call, sink=both)

    def replay(self, recording: Recording) -> None:
        """Hand on a recording in place of the call that is expected."""
        call = self._awaited()
        self.forget()
        call.sink(recording)

    def take(self) -> _Expected | None:
        """Return the expected call and expect it no longer."""
        call = self._thread.call
        self.forget()
        return call

    def resume(self, call: _Expected | None) -> None:
        """Expect the next call too, where all calls are recorded."""
        if call is not None and call.every:
            self._thread.call = call

    def _awaited(self) -> Any:
        call = self._thread.call
        assert call is not None, "no recording is awaited"
        assert call.sink is not None, "no recording is awaited"
        return call


class _View:
    """A config that shares all attributes of the host's config but the attention's name.

    Its slots hold the host's config and the recorder.
    """

    __slots__ = ()
    _atp_host: Any
    _atp_recorder: Recorder

    def __init_subclass__(cls, **_: Any) -> None:
        """Do nothing here, since transformers would make the subclass a dataclass."""

    @property
    def _attn_implementation(self) -> Any:
        if self._atp_recorder.expects(self):
            return ATTENTION_NAME
        return self._atp_host._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._atp_host._attn_implementation = value

    def __copy__(self) -> Any:
        """Return a copy of the host's config, which no recorder watches."""
        return copy.copy(self._atp_host)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _viewed(*(copy.deepcopy(x, memo) for x in (self._atp_host, self._atp_recorder)))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _viewed, (self._atp_host, self._atp_recorder)


def _viewed(host: Any, recorder: Recorder) -> Any:
    """Return a view of a config."""
    kind = type(host)
    names = {"__slots__": ("_atp_host", "_atp_recorder"), "__module__": kind.__module__}
    made: Any = object.__new__(type(kind.__name__, (_View, kind), names))
    made.__dict__ = host.__dict__
    object.__setattr__(made, "_atp_host", host)
    object.__setattr__(made, "_atp_recorder", recorder)
    return made


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Record the call where it is expected, then attend. This is our attention function.

    It attends with the function in the keyword ``ATTEND`` where there is one, else as the host.
    Queries are multiplied by ``QUERY_FACTOR`` where that is given.
    """
    recorder: Recorder = module.config._atp_recorder
    factor = kwargs.pop(QUERY_FACTOR, None)
    if factor is not None:
        query = (query * factor[:, None, :, None]).to(query.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = recorder.take()
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if call is not None and call.sink is not None:
        found = Recording(
            query,
            key,
            attention_mask,
            scale,
            module,
            rotary=call.rotary,
            softcap=softcap,
            sinks=sinks,
        )
        call.sink(found)
    implementation = module.config._attn_implementation
    attend = kwargs.pop(ATTEND, None)
    if attend is not None:
        return attend(
            query,
            key,
            value,
            attention_mask,
            scale,
            dropout=kwargs.get("dropout", 0.0),
            softcap=softcap,
            sinks=sinks,
            probabilities=implementation == "eager",
        )
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager_function(module))
    try:
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    finally:
        recorder.resume(call)


def _eager_function(module: Any) -> Callable[..., Any]:
    """Return the eager attention of the file that defines the attention module."""
    home = sys.modules[type(module).__module__]
    function = getattr(home, "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not go through transformers' attention interface, so "
            f"its queries and keys cannot be read; use a model class of transformers >= 5.4."
        )
    return function
