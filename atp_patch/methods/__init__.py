"""One file a method: what it sees before a layer -> what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from atp_patch.contract.arguments import as_kind
from atp_patch.contract.errors import ConfigError
from atp_patch.methods.atp import ATP
from atp_patch.methods.base import (
    BeforeDecoder,
    Compressor,
    Merger,
    Method,
    ModuleSpec,
    Shrinker,
    Strategy,
)
from atp_patch.methods.baselines import Random, Uniform
from atp_patch.methods.downsample import Downsample
from atp_patch.methods.fastv import FastV
from atp_patch.methods.fixed import Fixed
from atp_patch.methods.prumerge import PruMerge, PruMergePlus
from atp_patch.methods.sparsevlm import SparseVLM
from atp_patch.methods.voco import VoCo

METHODS: tuple[type[Strategy], ...] = (
    ATP,
    Fixed,
    FastV,
    SparseVLM,
    PruMerge,
    PruMergePlus,
    Random,
    Uniform,
    Downsample,
    VoCo,
)


def available_methods() -> list[str]:
    """Names that ``patch_model(method=...)`` takes."""
    return [method.name for method in METHODS]


def untrained_methods() -> list[str]:
    """Names of those that work without training."""
    return [method.name for method in METHODS if not issubclass(method, Compressor)]


def make_method(method: str | Strategy, options: dict[str, Any]) -> Strategy:
    """A method from its name and options, or as given.

    Raises:
        ConfigError: for an unknown name or option, naming the known ones.
    """
    if isinstance(method, Strategy):
        if options:
            raise ConfigError(
                f"unknown arguments {', '.join(sorted(options))}: a method given as an object "
                f"brings its options along."
            )
        return method
    cls = _class_of(method)
    kinds = {f.name: str(getattr(f.type, "__name__", f.type)) for f in fields(cls)}
    unknown = sorted(set(options) - set(kinds))
    if unknown:
        raise ConfigError(
            f"method {method!r} has no option {', '.join(unknown)}; it has: "
            f"{', '.join(kinds) or 'none'}."
        )
    return cls(**{name: as_kind(name, value, kinds[name]) for name, value in options.items()})


def _class_of(name: str) -> type[Strategy]:
    """One of this package's, or the user's own that was defined last."""
    own: list[type[Strategy]] = []
    waiting: list[type[Strategy]] = [Strategy]
    while waiting:
        cls = waiting.pop()  # the youngest first
        waiting += cls.__subclasses__()
        own += [cls] if vars(cls).get("name") == name and cls not in METHODS else []
    found = [cls for cls in METHODS if cls.name == name] or own
    if not found:
        raise ConfigError(
            f"unknown method {name!r}; known are: {', '.join(available_methods())}. A method of "
            "your own must be defined first."
        )
    return found[0]


def make_methods(
    method: str | Strategy | Sequence[str | Strategy], options: dict[str, Any]
) -> tuple[BeforeDecoder | Compressor | None, Method | None]:
    """What prunes before the decoder and what prunes inside it, from one method or one of each.

    Options are those of the one method, or of the second.

    Raises:
        ConfigError: for two of one kind, the wrong order, or a first that needs a budget of its
            own.
    """
    if isinstance(method, (str, Strategy)):
        only = make_method(method, options)
        return (None, only) if isinstance(only, Method) else (_before(only), None)
    given = list(method)
    made = [make_method(one, options if one is given[-1] else {}) for one in given]
    if len(made) == 1:
        return make_methods(made[0], {})
    if (
        len(made) != 2
        or isinstance(made[0], (Method, Compressor))
        or not isinstance(made[1], Method)
    ):
        inside = [cls.name for cls in METHODS if issubclass(cls, Method)]
        before = [cls.name for cls in METHODS if not issubclass(cls, (Method, Compressor))]
        raise ConfigError(
            f"method={[one.name for one in made]}: give one method, or one that prunes before the "
            f"decoder ({', '.join(before)}) and then one that prunes inside it "
            f"({', '.join(inside)})."
        )
    if made[0].needs_budget:
        raise ConfigError(
            f"{made[0].name} needs a budget, which in a pair is the second method's; use it alone."
        )
    return _before(made[0]), made[1]


def _before(method: Strategy) -> BeforeDecoder | Compressor:
    if not isinstance(method, (Merger, Shrinker, Compressor)):
        raise ConfigError(
            f"{method.name} is neither a Method nor a Merger, a Shrinker or a Compressor."
        )
    return method


__all__ = [
    "ATP",
    "METHODS",
    "BeforeDecoder",
    "Compressor",
    "Downsample",
    "FastV",
    "Fixed",
    "Merger",
    "Method",
    "ModuleSpec",
]
__all__ += ["PruMerge", "PruMergePlus", "Random", "Shrinker", "SparseVLM", "Strategy"]
__all__ += ["Uniform", "VoCo"]
__all__ += ["available_methods", "make_method", "make_methods", "untrained_methods"]
