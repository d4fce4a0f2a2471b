"""What is measured: a method with its options, layers, budget and seed, or a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from atp_patch.calibration import CONTROLS
from atp_patch.config import DEFAULT_LAYERS, scaled_layers
from atp_patch.errors import BudgetError, ConfigError, UnsupportedModelError
from atp_patch.evaluation.identity import adapter_hash
from atp_patch.methods import METHODS, Compressor, Method, available_methods, make_method
from atp_patch.patch import patch_model, require_patch, unpatch_model

UNPRUNED, BLIND = "unpruned", "no visual tokens"
DROPPED = "no visual tokens from"
_NOTHING = 1e-9
BASELINES = ("random", "uniform")


@dataclass(frozen=True)
class Setting:
    """One way to answer all questions.

    Attributes:
        name: UNPRUNED, BLIND, a method's name, "adapter NAME", or DROPPED: the unpruned model up
            to the layer in ``layers``, from which on it has no visual tokens.
        options: of the method, sorted; ``layers``: before which it prunes.
        budget: visual tokens averaged over all decoder layers, as a share of all; None where the
            method, or an adapter, decides by itself.
        seed: of what a method draws at random, None where it draws nothing.
        adapter: folder or Hub id, and the hash of its files.
        control: which thresholds stand in for the adapter's own, or None.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    layers: tuple[int, ...] = ()
    budget: float | None = None
    seed: int | None = None
    adapter: str | None = None
    adapter_hash: str | None = None
    control: str | None = None

    @property
    def is_reference(self) -> bool:
        """Whether nothing is pruned inside the decoder."""
        return self.name in (UNPRUNED, BLIND)

    @property
    def pooled(self) -> Setting:
        """The same without its seed: what the seeds of one setting have in common."""
        return replace(self, seed=None)

    def identity(self) -> dict[str, Any]:
        """As plain data, for files: options with their defaults, the adapter by its hash alone."""
        data = asdict(self) | {"options": dict(self.options), "layers": list(self.layers)}
        if self.name in available_methods():
            data["options"] = make_method(self.name, dict(self.options)).options()
            data["options"].pop("seed", None)
        del data["adapter"]
        if self.control is None:
            del data["control"]
        return {"method": data.pop("name"), **data}


@contextmanager
def applied(model: Any, setting: Setting, visual_tokens: int) -> Iterator[Any]:
    """The model as the setting wants it; plain again afterwards.

    Raises:
        BudgetError: where method and layers cannot meet the budget.
        ConfigError: where an option or a layer is wrong.
    """
    if setting.is_reference:
        yield model
        return
    if setting.adapter is not None:
        patch_model(model, weights=setting.adapter)
    elif setting.name == DROPPED:
        patch_model(model, list(setting.layers), "uniform", keep=_NOTHING, min_tokens=0)
    else:
        options = dict(setting.options)
        if setting.seed is not None:
            options["seed"] = setting.seed
        target = None if setting.budget is None else setting.budget * visual_tokens
        layers = list(setting.layers) or None
        patch_model(model, layers, setting.name, target_tokens=target, **options)
    try:
        require_patch(model).check_budget(visual_tokens)
        yield model
    finally:
        unpatch_model(model)


def unreachable(model: Any, setting: Setting, visual_tokens: int) -> str | None:
    """Why a setting cannot meet its budget, or the model not take its method, or None; raises what
    else is wrong with it.
    """
    try:
        with applied(model, setting, visual_tokens):
            return None
    except (BudgetError, UnsupportedModelError) as error:
        return str(error)


def plan(
    methods: Sequence[str],
    budgets: Sequence[float],
    seeds: int,
    options: dict[str, Any],
    layers: Sequence[int] | None,
    adapters: Sequence[str],
    num_layers: int,
    drop_from: Sequence[int] = (),
) -> list[Setting]:
    """All settings, references first, then by budget; random and uniform are always among them.

    Args:
        methods: names, each with layers of its own where it says so: "fastv@2", "atp@1+13+25".
        options: given to every method that has them; "METHOD.NAME" goes to one method alone.
        layers: of methods without their own; the paper's, scaled to the decoder, by default.
        drop_from: layers from which on to leave out all visual tokens, one a setting.

    Raises:
        ConfigError: for an unknown method, or an option that no chosen method has.
    """
    if layers is None:
        fits = num_layers > max(DEFAULT_LAYERS)
        layers = DEFAULT_LAYERS if fits else scaled_layers(num_layers)
    named = [_parse(spec, layers) for spec in methods]
    named += [(name, tuple(layers)) for name in BASELINES if name not in dict(named)]
    _check_options(options, [name for name, _ in named])
    settings = [Setting(UNPRUNED), Setting(BLIND)]
    settings += [Setting(DROPPED, layers=(layer,)) for layer in drop_from]
    free: list[Setting] = []
    limited: list[Setting] = []
    for name, places in dict.fromkeys(named):
        given = _options_of(name, options)
        method = make_method(name, given)
        known = {entry.name for entry in fields(method)}
        drawn = range(seeds) if "seed" in known and "seed" not in given else [None]
        base = Setting(name, tuple(sorted(given.items())), places)
        inside = isinstance(method, Method)
        drawn_each = [replace(base, layers=places if inside else (), seed=s) for s in drawn]
        if not method.needs_budget:
            free += drawn_each
        if method.takes_budget:
            limited += drawn_each
    settings += [_adapter(spec) for spec in adapters]
    settings += free
    for budget in budgets:
        settings += [replace(setting, budget=budget) for setting in limited]
    return settings


def _adapter(spec: str) -> Setting:
    """From "FOLDER", or "FOLDER~mean" and "FOLDER~shuffled" for its controls."""
    source, tilde, control = spec.rpartition("~")
    if not tilde or Path(spec).is_dir():
        source, control = spec, ""
    elif control not in CONTROLS:
        raise ConfigError(
            f"--adapters {spec}: after ~ comes one of {', '.join(CONTROLS)}, as in "
            f"{source}~{CONTROLS[0]}."
        )
    return Setting(
        f"adapter {Path(spec).name}",
        adapter=source,
        adapter_hash=adapter_hash(source),
        control=control or None,
    )


def _parse(spec: str, layers: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    name, _, places = spec.partition("@")
    if name not in available_methods():
        raise ConfigError(
            f"--methods: there is no method {name!r}; there are {', '.join(available_methods())}."
        )
    cls = next(cls for cls in METHODS if cls.name == name)
    if issubclass(cls, Compressor):
        raise ConfigError(
            f"--methods {spec}: {name} is nothing before it is trained; give the folder of a "
            "trained one to --adapters."
        )
    if places and not issubclass(cls, Method):
        raise ConfigError(f"--methods {spec}: {name} prunes before the decoder; give {name}.")
    try:
        return name, tuple(int(p) for p in places.split("+")) if places else tuple(layers)
    except ValueError as error:
        raise ConfigError(
            f"--methods {spec}: after @ come layers, as in {name}@1+13+25."
        ) from error


def _fields_of(name: str) -> set[str]:
    return {entry.name for cls in METHODS if cls.name == name for entry in fields(cls)}


def _options_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those meant for a method: of its own name, or of any method's and known to it."""
    mine = {k: v for k, v in options.items() if k in _fields_of(name)}
    own = {k.partition(".")[2]: v for k, v in options.items() if k.partition(".")[0] == name}
    return mine | own


def _check_options(options: dict[str, Any], names: Sequence[str]) -> None:
    for option in options:
        owner, dot, field = option.partition(".")
        chosen = [owner] if dot else list(dict.fromkeys(names))
        if (dot and owner not in names) or not any(
            (field or owner) in _fields_of(n) for n in chosen
        ):
            known = {n: sorted(_fields_of(n)) for n in dict.fromkeys(names)}
            told = "; ".join(f"{n}: {', '.join(f) or 'none'}" for n, f in known.items())
            raise ConfigError(f"--option: no chosen method has {option!r}; they have {told}.")
