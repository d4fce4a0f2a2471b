"""Whether the vision tower reads images or videos, which only the method that calls it knows."""

from __future__ import annotations

import inspect
from typing import Any

from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.replaced import Replaced

METHOD = "get_video_features"


class _InThread(PerThread):
    """Whether the running thread is reading videos."""

    def __init__(self) -> None:
        self.under_way = False


class Videos:
    """Stands in for the base model's method that reads videos, where it has one."""

    def __init__(self, base: Any) -> None:
        self.base, self._here = base, _InThread()
        self._replaced: Replaced | None = None

    def install(self) -> None:
        """Put this object in the method's place."""
        if hasattr(self.base, METHOD):
            self._replaced = Replaced(self.base, METHOD, self)

    def remove(self) -> None:
        """Put the method back."""
        if self._replaced is not None:
            self._replaced.restore()

    @property
    def being_read(self) -> bool:
        """Whether a call of the method is under way in the running thread."""
        return self._here.under_way

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the host's method, from which ``generate`` chooses its arguments."""
        assert self._replaced is not None
        return inspect.signature(self._replaced.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the host's method, and let :attr:`being_read` be True meanwhile."""
        assert self._replaced is not None
        self._here.under_way = True
        try:
            return self._replaced.original(*args, **kwargs)
        finally:
            self._here.under_way = False
