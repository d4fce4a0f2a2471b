"""A method of one object with another in its place for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replaced:
    """Puts ``by`` into an object's own attributes; :meth:`restore` leaves them as they were."""

    def __init__(self, owner: Any, name: str, by: Callable[..., Any]) -> None:
        self.owner, self.name, self.by = owner, name, by
        self._own = owner.__dict__.get(name)  # the caller's, for this object alone
        setattr(owner, name, by)

    @property
    def original(self) -> Callable[..., Any]:
        """What the object would do by itself."""
        made: Callable[..., Any] = getattr(type(self.owner), self.name).__get__(self.owner)
        return made if self._own is None else self._own

    def restore(self) -> None:
        """Take it back, unless somebody has put in something else since."""
        if self.owner.__dict__.get(self.name) != self.by:
            return
        delattr(self.owner, self.name)
        if self._own is not None:
            setattr(self.owner, self.name, self._own)
