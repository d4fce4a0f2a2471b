"""Arguments as Python's own numbers, which JSON can hold; what is of another kind is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

from atp_patch.contract.errors import ConfigError


def as_shares(
    keep: float | Sequence[float] | None, layers: Sequence[int]
) -> tuple[float, ...] | None:
    """One share for every pruning layer."""
    if keep is None:
        return None
    try:
        if isinstance(keep, Iterable):
            return tuple(float(share) for share in keep)
        return (float(keep),) * max(len(layers), 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"keep={keep!r}: give a number, or one for each layer.") from error


def as_tokens(target: float | None) -> float | None:
    """A number of tokens that JSON can hold."""
    try:
        return target if target is None or isinstance(target, int) else float(target)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"target_tokens={target!r} is no number.") from error


def as_layers(layers: Iterable[int]) -> tuple[int, ...]:
    """Whole numbers, of whatever kind."""
    try:
        return tuple(index(layer) for layer in layers)
    except TypeError as error:
        raise ConfigError(
            f"layers={layers!r}: give a list of whole numbers, as [4, 14, 24]."
        ) from error


def as_kind(name: str, value: Any, kind: str) -> Any:
    """An option of a kind ("int", "float | None", ...) as Python's own, which JSON can hold.

    Raises:
        ConfigError: where the value is of another kind.
    """
    if value is None and kind.endswith("| None"):
        return None
    wanted = kind.removesuffix(" | None")
    truth = isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"
    if wanted == "int" and isinstance(value, Integral) and not truth:
        return index(value)
    if wanted == "float" and isinstance(value, Real) and not truth:
        return value if isinstance(value, int) else float(value)
    if wanted == "bool" and truth:
        return bool(value)
    if wanted == "str" and isinstance(value, str):
        return value
    said = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a word"}
    if wanted in said:
        raise ConfigError(f"{name}={value!r}: give {said[wanted]}.")
    return value  # of a kind that only the user's own method knows
