"""One check for arguments and for values from JSON: plain Python values of the right kind.

A bool is not accepted as a number, 1.5 is not accepted as a whole number, and no number may be NaN
or infinite. Kinds are written as a dataclass annotates its fields: "int", "float | None",
"tuple[int, ...]" and so on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from inspect import formatannotation
from numbers import Integral, Real
from operator import index
from typing import Any

from atp_patch.contract.errors import ConfigError

MOST_TOKENS = 2**31 - 1  # the most tokens of a prompt, more than any model can read
_INT_BOUND = 2**63  # integers go into int64 tensors
_FLOAT_BOUND = 3e38  # numbers go into float32 tensors
_SHOWN = 120  # characters of a wrong value that a message repeats
_SAID = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "a word",
    "dict[str, Any]": "a table of names and values",
}


def as_kind(name: str, value: Any, kind: str) -> Any:
    """Check that a value is of a kind and return it as a plain Python value that JSON can hold.

    Args:
        name: the name of the argument, for error messages.
        value: the value to check.
        kind: "int", "float", "bool", "str", "dict[str, Any]", a tuple of those as
            "tuple[int, ...]", or one of them and " | None". A value of any other kind, which only
            the user's own method knows, is returned unchanged.

    Raises:
        ConfigError: where the value is of another kind, not finite, or too large.
    """
    if kind.endswith(" | None"):
        return None if value is None else as_kind(name, value, kind.removesuffix(" | None"))
    if kind.startswith("tuple[") and kind.endswith(", ...]"):
        return _as_tuple(name, value, kind.removeprefix("tuple[").removesuffix(", ...]"))
    value = _unwrapped(value)
    if kind == "int" and isinstance(value, Integral) and not isinstance(value, bool):
        number = index(value)
        if not -_INT_BOUND <= number < _INT_BOUND:
            raise ConfigError(f"{name}={shown(number)} is too large a number.")
        return number
    if kind == "float" and isinstance(value, Real) and not isinstance(value, bool):
        return _finite(name, value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str) and _encodable(value):
        return value
    if kind == "dict[str, Any]" and isinstance(value, Mapping):
        return dict(value)
    if kind in _SAID:
        raise ConfigError(f"{name}={shown(value)}: give {_SAID[kind]}.")
    return value


def as_shares(
    keep: float | Sequence[float] | None, layers: Sequence[int]
) -> tuple[float, ...] | None:
    """Return one share for each pruning layer, from one share for all or one for each."""
    if keep is None:
        return None
    if isinstance(_unwrapped(keep), Iterable) and not isinstance(keep, str):
        return tuple(as_kind("keep", keep, "tuple[float, ...]"))
    return (as_kind("keep", keep, "float"),) * max(len(layers), 1)


def kinds_of(cls: Any) -> dict[str, str]:
    """Return the name and kind of each field of a dataclass or of an instance of one."""
    return {
        field.name: field.type if isinstance(field.type, str) else formatannotation(field.type)
        for field in fields(cls)
    }


def check_fields(made: Any) -> None:
    """Convert the fields of a dataclass instance, which may be frozen, to the kinds it declares.

    Raises:
        ConfigError: where a field holds something of another kind.
    """
    for name, kind in kinds_of(made).items():
        object.__setattr__(made, name, as_kind(name, getattr(made, name), kind))


def shown(value: Any) -> str:
    """Return a value as one short line for a message, however large or deep the value is."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # integers of thousands of digits; lists in lists
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _as_tuple(name: str, value: Any, kind: str) -> tuple[Any, ...]:
    """Check that each of several values is of a kind."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    try:
        items = tuple(value) if several else None
    except TypeError:  # a tensor without dimensions has an __iter__ all the same
        items = None
    said = f"{name}={shown(value)}: give a list, each {_SAID.get(kind, kind)}"
    if items is None:
        raise ConfigError(f"{said}.")
    try:
        return tuple(as_kind(f"{name}[{at}]", item, kind) for at, item in enumerate(items))
    except ConfigError as error:
        raise ConfigError(f"{said} ({error})") from error


def _unwrapped(value: Any) -> Any:
    """Return a scalar of NumPy or torch as a Python number, and anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _finite(name: str, value: Any) -> float:
    """Return a number that is within the range of float32; an int stays an int."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _FLOAT_BOUND:
        raise ConfigError(f"{name}={shown(value)}: give a finite number.")
    return value if isinstance(value, int) else number


def _encodable(text: str) -> bool:
    """Return whether the text can be encoded; JSON's escapes can name one half of a surrogate
    pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
