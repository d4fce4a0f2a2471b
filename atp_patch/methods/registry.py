"""Methods by name: those of this package, of other packages, and of the user's own code.

Another package offers methods as entry points of the group ``atp_patch.methods``. The name of an
entry point is the name of the method. It is loaded only when the method is used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from atp_patch.contract import DoorMethod, LayerMethod, Method, PictureMethod, TowerMethod
from atp_patch.contract.arguments import as_kind, check_fields, kinds_of, shown
from atp_patch.contract.errors import ConfigError
from atp_patch.methods.atp import ATP
from atp_patch.methods.baselines import Random, Uniform
from atp_patch.methods.cdpruner import CDPruner
from atp_patch.methods.dart import DART
from atp_patch.methods.divprune import DivPrune
from atp_patch.methods.downsample import Downsample
from atp_patch.methods.fastervlm import FasterVLM
from atp_patch.methods.fastv import FastV
from atp_patch.methods.fixed import Fixed
from atp_patch.methods.hiprune import HiPrune
from atp_patch.methods.prumerge import PruMerge, PruMergePlus
from atp_patch.methods.prunesid import PruneSID
from atp_patch.methods.pyramiddrop import PyramidDrop
from atp_patch.methods.scope import SCOPE
from atp_patch.methods.sparsevlm import SparseVLM
from atp_patch.methods.visionzip import VisionZip
from atp_patch.methods.vispruner import VisPruner
from atp_patch.methods.voco import VoCo
from atp_patch.methods.vscan import VScan

METHODS: tuple[type[Method], ...] = (
    ATP,
    Fixed,
    FastV,
    SparseVLM,
    PyramidDrop,
    DART,
    PruMerge,
    PruMergePlus,
    FasterVLM,
    VisionZip,
    DivPrune,
    SCOPE,
    CDPruner,
    VisPruner,
    HiPrune,
    PruneSID,
    VScan,
    Random,
    Uniform,
    Downsample,
    VoCo,
)
GROUP = "atp_patch.methods"
# The base class of the methods of each place.
PLACES: dict[str, type[Method]] = {
    "picture": PictureMethod,
    "tower": TowerMethod,
    "door": DoorMethod,
    "layer": LayerMethod,
    "voco": VoCo,
}


@dataclass(frozen=True)
class MethodSet:
    """The methods of one patch by the places where they prune; a place without one has None.

    There is one method, or one of ``picture``, ``tower`` and ``door`` together with ``layer``.

    Attributes:
        picture: the method that shrinks pictures.
        tower: the method that merges tokens of the vision tower.
        door: the method that chooses among projected features before layer 0.
        layer: the method that prunes inside the decoder.
        voco: the method that compresses images into VoCo tokens.
    """

    picture: PictureMethod | None = None
    tower: TowerMethod | None = None
    door: DoorMethod | None = None
    layer: LayerMethod | None = None
    voco: VoCo | None = None

    @property
    def vision(self) -> PictureMethod | TowerMethod | None:
        """The method that prunes before projected features exist: ``picture`` or ``tower``."""
        return self.tower if self.picture is None else self.picture

    @property
    def before(self) -> Method | None:
        """The method that prunes before the decoder, at whichever place."""
        return self.vision or self.door or self.voco

    @property
    def last(self) -> Method:
        """The method that takes the budget and the options: the last of a pair, or the only one."""
        method = self.layer or self.before
        assert method is not None, "a set holds at least one method"
        return method


def available_methods() -> list[str]:
    """Return the names that ``patch_model(method=...)`` takes, first this package's, then other
    packages'.
    """
    own = [method.name for method in METHODS]
    return own + sorted({point.name for point in _entry_points()} - set(own))


def untrained_methods() -> list[str]:
    """Return the names of this package's methods that work without training."""
    return [method.name for method in METHODS if method.where != "voco"]


def method_class(name: str) -> type[Method]:
    """Return the class of a method by its name.

    The class is looked for in this package, then among the classes that are defined, of which the
    last one is taken, then in other packages.

    Raises:
        ConfigError: if the name is unknown, two packages have a method of this name, or the package
            that has it is broken.
    """
    own = [cls for cls in METHODS if cls.name == name]
    points = [point for point in _entry_points() if point.name == name]
    if len(own) + len(points) > 1:
        claims = ["atp_patch"] * len(own) + [_package(point) for point in points]
        raise ConfigError(
            f"method {name!r} is claimed by {' and by '.join(claims)}; uninstall one of these "
            "packages, or rename its entry point."
        )
    defined = own or _defined(name)
    if defined:
        return defined[0]
    if points:
        return _loaded(points[0])
    raise ConfigError(
        f"unknown method {shown(name)}; known are: {', '.join(available_methods())}. A method of "
        "your own must be defined first."
    )


def _entry_points() -> tuple[EntryPoint, ...]:
    """Return the methods that packages on today's ``sys.path`` bring."""
    return _entry_points_on(tuple(sys.path))


@lru_cache(maxsize=8)
def _entry_points_on(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Do what :func:`_entry_points` does. Reading the metadata of every package there takes
    milliseconds, so it is done once; a package that is installed later is seen by the next process.
    """
    return tuple(entry_points(group=GROUP))


def _defined(name: str) -> list[type[Method]]:
    """Return all defined classes of this name, the one defined last first."""
    found: list[type[Method]] = []
    waiting: list[type[Method]] = [Method]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        found += [cls] if vars(cls).get("name") == name else []
    return found


def _package(point: EntryPoint) -> str:
    return "an unnamed package" if point.dist is None else point.dist.name


def _loaded(point: EntryPoint) -> type[Method]:
    """Load the class that an entry point names."""
    where = f"method {point.name!r} of the package {_package(point)} ({point.value})"
    try:
        cls = point.load()
    except Exception as error:  # the import of another package may raise anything
        raise ConfigError(
            f"{where} cannot be loaded ({type(error).__name__}: {error}); mend or uninstall that "
            "package."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method)) or inspect.isabstract(cls):
        raise ConfigError(f"{where} is not a class of methods that can be made; mend that package.")
    if getattr(cls, "name", None) != point.name:
        raise ConfigError(
            f"{where} calls itself {getattr(cls, 'name', None)!r}; its entry point must have the "
            "same name."
        )
    return cls


def make_method(method: str | Method, options: dict[str, Any]) -> Method:
    """Make a method from its name and options, or return a given method.

    Raises:
        ConfigError: if the name or an option is unknown, or if ``method`` is neither a name nor a
            method.
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(
                f"unknown arguments {', '.join(sorted(options))}: a method given as an object "
                f"has its options already."
            )
        check_fields(method)
        return _standing(method)
    if not isinstance(method, str):
        mend = "give a name, or an object of a class that derives from atp_patch.Method"
        if isinstance(method, type) and issubclass(method, Method):
            mend = f"give an object of the class: method={method.__name__}()"
        raise ConfigError(f"method={method!r} is no method; {mend}.")
    cls = method_class(method)
    kinds = kinds_of(cls)
    unknown = sorted(set(options) - set(kinds))
    if unknown:
        wrong = shown(", ".join(unknown)).strip("'")
        raise ConfigError(
            f"method {shown(method)} has no option {wrong}; it has: {', '.join(kinds) or 'none'}."
        )
    required = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        raise ConfigError(f"method {method!r} needs its options {', '.join(missing)}.")
    made = {name: as_kind(name, value, kinds[name]) for name, value in options.items()}
    return _standing(cls(**made))


def _standing(method: Method) -> Method:
    """Return the method after checking that it has a name and a place where it prunes."""
    if not isinstance(getattr(method, "name", None), str):
        raise ConfigError(f"{type(method).__name__} has no name; give the class name = '...'.")
    if not isinstance(method, PLACES.get(getattr(method, "where", ""), ())):
        raise ConfigError(
            f"{method.name} has no place where it prunes: derive {type(method).__name__} from "
            "atp_patch.PictureMethod, TowerMethod, DoorMethod or LayerMethod."
        )
    return method


def make_methods(
    method: str | Method | Sequence[str | Method], options: dict[str, Any]
) -> MethodSet:
    """Make the methods of a patch.

    Args:
        method: one method, or a pair of one that prunes before the decoder and one inside it.
        options: options of the one method, or of the second.

    Raises:
        ConfigError: if both methods are of one kind or in the wrong order, or if the first needs a
            budget.
    """
    given: list[Any] = list(method) if isinstance(method, (list, tuple)) else [method]
    made = [make_method(one, options if one is given[-1] else {}) for one in given]
    where = [one.where for one in made]
    if len(made) == 2 and where[0] in ("picture", "tower", "door") and where[1] == "layer":
        first, own = made[0], _stage_before(made[1])
        if own is not None and type(own) is not type(first):
            raise ConfigError(
                f"{made[1].name} has a part of its own that prunes before the decoder; use it "
                f"alone, or another method behind {first.name}."
            )
        if first.needs_budget and where[0] != "door":
            raise ConfigError(
                f"{first.name} needs a budget, which in a pair is the second method's; use it "
                "alone."
            )
    elif len(made) != 1:
        inside = [cls.name for cls in METHODS if cls.where == "layer"]
        before = [cls.name for cls in METHODS if cls.where in ("picture", "tower", "door")]
        raise ConfigError(
            f"method={[one.name for one in made]}: give one method, or one that prunes before the "
            f"decoder ({', '.join(before)}) and then one that prunes inside it "
            f"({', '.join(inside)})."
        )
    by_place: dict[str, Any] = dict(zip(where, made, strict=True))
    if len(made) == 1 and (own := _stage_before(made[0])) is not None:
        by_place["door"] = own
    return MethodSet(**by_place)


def _stage_before(method: Method) -> DoorMethod | None:
    """Return the part of a method of two stages that prunes at the decoder's door, or None."""
    return method.stage_before() if isinstance(method, LayerMethod) else None
