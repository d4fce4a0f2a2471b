"""One file a method: what it sees before a layer -> what it keeps."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from atp_patch.errors import ConfigError
from atp_patch.methods.atp import ATP, Fixed
from atp_patch.methods.base import Method, ModuleSpec
from atp_patch.methods.baselines import Random, Uniform
from atp_patch.methods.fastv import FastV

METHODS: tuple[type[Method], ...] = (ATP, Fixed, FastV, Random, Uniform)


def available_methods() -> list[str]:
    """Names that ``patch_model(method=...)`` takes."""
    return [method.name for method in METHODS]


def make_method(method: str | Method, options: dict[str, Any]) -> Method:
    """A method from its name and options, or as given.

    Raises:
        ConfigError: for an unknown name or option, naming the known ones.
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(
                f"unknown arguments {', '.join(sorted(options))}: a method given as an object "
                f"brings its options along."
            )
        return method
    for cls in METHODS:
        if cls.name == method:
            known = [field.name for field in fields(cls)]
            unknown = sorted(set(options) - set(known))
            if unknown:
                raise ConfigError(
                    f"method {method!r} has no option {', '.join(unknown)}; it has: "
                    f"{', '.join(known) or 'none'}."
                )
            return cls(**options)
    raise ConfigError(f"unknown method {method!r}; known are: {', '.join(available_methods())}.")


__all__ = ["ATP", "METHODS", "FastV", "Fixed", "Method", "ModuleSpec", "Random", "Uniform"]
__all__ += ["available_methods", "make_method"]
