"""Whether the vision tower reads videos: it gets the same from both, so its caller must tell."""

from __future__ import annotations

import inspect
from typing import Any

from atp_patch.seam.host.replaced import Replaced

METHOD = "get_video_features"


class Videos:
    """Stands in for the base model's method that reads videos, where it has one.

    Attributes:
        being_read: whether a call of it is under way.
    """

    def __init__(self, base: Any) -> None:
        self.base, self.being_read = base, False
        self._replaced: Replaced | None = None

    def install(self) -> None:
        """Take the method's place."""
        if hasattr(self.base, METHOD):
            self._replaced = Replaced(self.base, METHOD, self)

    def remove(self) -> None:
        """Take that back."""
        if self._replaced is not None:
            self._replaced.restore()

    @property
    def __signature__(self) -> inspect.Signature:
        """The host's: ``generate`` reads off it which arguments to give."""
        assert self._replaced is not None
        return inspect.signature(self._replaced.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own method, in the knowledge that it runs."""
        assert self._replaced is not None
        self.being_read = True
        try:
            return self._replaced.original(*args, **kwargs)
        finally:
            self.being_read = False
