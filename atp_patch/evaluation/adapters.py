"""What ``--adapters`` names: adapters, several trainings of one recipe, folders, and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_patch.contract.errors import ConfigError
from atp_patch.tools.threshold_controls import CONTROLS
from atp_patch.tools.trained import find_trained, shipped

SHIPPED = "shipped"


@dataclass(frozen=True)
class Recipe:
    """An adapter, or several trainings of one recipe, whose answers are pooled as seeds are.

    Attributes:
        name: what tables call it.
        source: what ``--adapters`` named, without the control.
        control: which thresholds replace the adapters' own; None where these are kept.
        trainings: the adapters, each as ``find_trained`` takes it.
        pooled: whether ``source`` is a folder that may hold several trainings.
    """

    name: str
    source: str
    control: str | None
    trainings: tuple[str, ...]
    pooled: bool


def recipes(specs: Sequence[str], hub: Mapping[str, Any] | None = None) -> list[Recipe]:
    """Find everything that ``--adapters`` names.

    Args:
        specs: each is "A", or "A~mean" or "A~shuffled" for a control. A is "shipped" for all
            adapters that come with the package, an adapter as ``find_trained`` takes it, a folder
            of such adapters (trainings of one recipe), or a folder of such folders.
        hub: how adapters are read from the Hub, as ``find_trained`` takes it. Its revision is that
            of the adapters whose names end in none.

    Raises:
        ConfigError: for another control, or a folder that holds trainings and folders of them.
    """
    specs = [one for spec in specs for one in _each(spec)]
    short = [Path(spec).name for spec in specs]
    made = []
    for spec, name in zip(specs, short, strict=True):
        source, control = _controlled(spec)
        folder = Path(source)
        trainings = [] if (folder / "adapter").is_dir() else sorted(folder.glob("*/adapter"))
        made.append(
            Recipe(
                name=spec if short.count(name) > 1 else name,
                source=source,
                control=control,
                trainings=tuple(str(found.parent) for found in trainings)
                or (_here(source, hub or {}),),
                pooled=bool(trainings),
            )
        )
    return made


def _here(source: str, hub: Mapping[str, Any]) -> str:
    """Return the source, or the folder of an adapter that is downloaded from the Hub, once for
    all.
    """
    if source in shipped() or Path(source).exists():
        return source
    own = {"revision": None} if "@" in source else {}  # find_trained reads it from the name
    return find_trained(source, **{**hub, **own}).adapter


def _each(spec: str) -> list[str]:
    """Return several specs for "shipped" and for a folder of recipes, one for each adapter or
    recipe, and any other spec alone.
    """
    source, control = _controlled(spec)
    folder = Path(source)
    found = list(shipped()) if source == SHIPPED and not folder.exists() else []
    if not (folder / "adapter").is_dir():
        found += sorted({str(adapter.parents[1]) for adapter in folder.glob("*/*/adapter")})
    if not found:
        return [spec]
    if any(folder.glob("*/adapter")):
        raise ConfigError(f"--adapters {spec} holds trainings and folders of them; name each.")
    return [recipe if control is None else f"{recipe}~{control}" for recipe in found]


def _controlled(spec: str) -> tuple[str, str | None]:
    """Return the part before the tilde, and the control behind it, or None where there is no
    control.
    """
    source, tilde, control = spec.rpartition("~")
    if not tilde or Path(spec).is_dir():
        return spec, None
    if control not in CONTROLS:
        raise ConfigError(
            f"--adapters {spec}: after ~ comes one of {', '.join(CONTROLS)}, as in "
            f"{source}~{CONTROLS[0]}."
        )
    return source, control
