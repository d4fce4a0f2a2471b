"""How commands name methods: ``NAME@LAYERS:BUDGETS``, as in "prumerge+/atp@1+13:0.25"."""

from __future__ import annotations

from dataclasses import dataclass

from atp_patch.contract.errors import ConfigError
from atp_patch.methods import LayerMethod, available_methods, make_methods, method_class


@dataclass(frozen=True)
class MethodSpec:
    """One method, or one before the decoder and one inside it.

    Attributes:
        name: as it was written, "FIRST/SECOND" for two.
        layers: before which decoder layers the method prunes; None where none are named.
        budgets: visual tokens averaged over all decoder layers, as shares of all; None where none
            are named.
    """

    name: str
    layers: tuple[int, ...] | None
    budgets: tuple[float, ...] | None

    @property
    def stages(self) -> list[str]:
        """The name of each method, in the order in which they prune."""
        return stages(self.name)


def stages(name: str) -> list[str]:
    """Return the names of both methods in "FIRST/SECOND", or the one name."""
    return name.split("/")


def method_argument(name: str) -> str | list[str]:
    """Return what ``patch_model(method=...)`` takes for a name: a list for "FIRST/SECOND"."""
    found = stages(name)
    return found if len(found) > 1 else name


def read_method_spec(text: str) -> MethodSpec:
    """Read one of the methods that ``--methods`` names.

    >>> read_method_spec("prumerge+/atp@1+13:0.5+0.25")
    MethodSpec(name='prumerge+/atp', layers=(1, 13), budgets=(0.5, 0.25))

    Raises:
        ConfigError: for an unknown method or pair, for layers of one that does not prune inside the
            decoder, and where layers are no integers or budgets no shares.
    """
    rest, colon, shares = text.partition(":")
    name, at, layers = rest.partition("@")
    for stage in stages(name):
        if stage not in available_methods():
            known = ", ".join(available_methods())
            raise ConfigError(f"--methods: there is no method {stage!r}; there are {known}.")
    if len(stages(name)) > 1:
        make_methods(stages(name), {})  # says which pairs there are
    if at and not issubclass(method_class(stages(name)[-1]), LayerMethod):
        raise ConfigError(f"--methods {text}: {name} prunes before the decoder; give {name}.")
    try:
        return MethodSpec(
            name,
            tuple(int(layer) for layer in layers.split("+")) if at else None,
            tuple(_share(share) for share in shares.split("+")) if colon else None,
        )
    except ValueError as error:
        raise ConfigError(
            f"--methods {text}: after @ come layers, and after : shares above 0 and at most 1, as "
            f"in {name}@1+13+25:0.5+0.25."
        ) from error


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise ValueError(f"{text} is no share")
    return share
