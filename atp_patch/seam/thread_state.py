"""What a thread is doing with one patched model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atp_patch.seam.host.call import Call
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.session import Session


class ThreadState(PerThread):
    """What the running thread is doing with one patched model.

    Attributes:
        disabled: how many contexts of ``disabled(model)`` the thread is in.
        session: the call of ``generate`` that the thread is in, or None.
        call: the arguments of the forward pass that the thread is in, or None.
        entering: the decoder's pass that is about to enter layers that reuse keys, or None.
    """

    def __init__(self) -> None:
        self.disabled = 0
        self.session: Session | None = None
        self.call: Call | None = None
        self.entering: Any = None

    def end_pass(self) -> None:
        """Forget the forward pass that the thread was in."""
        self.call = self.entering = None

    @property
    def enabled(self) -> bool:
        """Whether the thread's passes with images are pruned."""
        return not self.disabled

    @property
    def reads_images(self) -> bool:
        """Whether the vision tower runs for a pass that is to be pruned."""
        return self.enabled and (self.call is not None or self.session is not None)

    @property
    def prompt_ids(self) -> Tensor | None:
        """(B, L) int64 ids of the prompt whose images are being read; None where none came."""
        if self.call is not None and self.call.input_ids is not None:
            return self.call.input_ids
        return None if self.session is None else self.session.ids
