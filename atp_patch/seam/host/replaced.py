"""Replacing a method of one object, and putting it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replaced:
    """A method of one object in whose place the object's own attributes hold ``by``."""

    def __init__(self, owner: Any, name: str, by: Callable[..., Any]) -> None:
        self.owner, self.name, self.by = owner, name, by
        self._own = owner.__dict__.get(name)  # one that the caller has set on this object
        setattr(owner, name, by)

    @property
    def original(self) -> Callable[..., Any]:
        """The method that the object would have without the replacement."""
        made: Callable[..., Any] = getattr(type(self.owner), self.name).__get__(self.owner)
        return made if self._own is None else self._own

    def restore(self) -> None:
        """Put the original back, unless another replacement has been made since."""
        if self.owner.__dict__.get(self.name) != self.by:
            return
        delattr(self.owner, self.name)
        if self._own is not None:
            setattr(self.owner, self.name, self._own)
