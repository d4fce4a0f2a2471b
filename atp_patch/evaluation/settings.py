"""The settings that are measured: methods with options, layers, budget and seed, and references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from atp_patch.contract.errors import BudgetError, ConfigError, UnsupportedModelError
from atp_patch.evaluation.adapters import Recipe, recipes
from atp_patch.evaluation.identity import adapter_hash
from atp_patch.methods import available_methods, make_methods, method_class
from atp_patch.patching.api import patch_model, require_patch, unpatch_model
from atp_patch.tools.method_spec import read_method_spec, stages
from atp_patch.tools.trained import find_trained, merged

UNPRUNED, BLIND = "unpruned", "no visual tokens"
DROPPED = "no visual tokens from"
CONTROL_QUESTIONS = 352  # controls are made from so many questions of the split train
_NOTHING = 1e-9
_LOSSES = ("lambda_atp", "lambda_target", "target_loss")  # options that matter in training alone
BASELINES = ("random", "uniform", "downsample")


@dataclass(frozen=True)
class Setting:
    """One way to answer all questions.

    Attributes:
        name: UNPRUNED, BLIND, a method's name, two methods' as "FIRST/SECOND", "adapter NAME", or
            DROPPED: the unpruned model up to the layer in ``layers``, from which on it has no
            visual tokens.
        options: names and values of the method's options, sorted; of two methods, the second's.
        layers: before which decoder layers the method prunes.
        budget: visual tokens averaged over all decoder layers, as a share of all; None where the
            method or the adapter decides itself how many to keep.
        seed: the seed of what the method draws at random; None where it draws nothing.
        adapter: a trained adapter as ``find_trained`` takes it, or None.
        adapter_hash: hash of the adapter's files, or None.
        control: which thresholds replace the adapter's own; None where these are kept.
        trainings: folder of several trainings of one recipe, one of which is ``adapter``; or None.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    layers: tuple[int, ...] = ()
    budget: float | None = None
    seed: int | None = None
    adapter: str | None = None
    adapter_hash: str | None = None
    control: str | None = None
    trainings: str | None = None

    @property
    def is_reference(self) -> bool:
        """Whether nothing is pruned inside the decoder."""
        return self.name in (UNPRUNED, BLIND)

    @property
    def lora(self) -> str | None:
        """Folder of the LoRA that was trained beside the adapter, or None."""
        return None if self.adapter is None else find_trained(self.adapter).lora

    @property
    def pooled(self) -> Setting:
        """This setting without its seed or training: settings with the same value are pooled."""
        if self.trainings is None:
            return replace(self, seed=None)
        return replace(self, adapter=self.trainings, adapter_hash=None)

    def identity(self) -> dict[str, Any]:
        """Return the setting as plain data for files: all options, those left at their defaults
        included, and the adapter's hash in place of its name.
        """
        data = asdict(self) | {"options": dict(self.options), "layers": list(self.layers)}
        if set(stages(self.name)) <= set(available_methods()):
            methods = make_methods(stages(self.name), dict(self.options))
            if methods.before is not None and methods.before is not methods.last:
                data["options_before"] = methods.before.options()
            data["options"] = methods.last.options()
            data["options"].pop("seed", None)
        del data["adapter"], data["trainings"]
        if self.control is None:
            del data["control"]
        else:
            data["control_questions"] = CONTROL_QUESTIONS
        return {"method": data.pop("name"), **data}


@contextmanager
def applied(model: Any, setting: Setting, visual_tokens: int) -> Iterator[Any]:
    """Patch the model as the setting says inside this context; it is plain again afterwards.

    Raises:
        BudgetError: where method and layers cannot meet the budget.
        ConfigError: where an option or a layer is wrong.
    """
    if setting.is_reference:
        yield model
        return
    if setting.adapter is not None:
        patch_model(model, weights=find_trained(setting.adapter).adapter)
    elif setting.name == DROPPED:
        patch_model(model, list(setting.layers), "uniform", keep=_NOTHING, min_tokens=0)
    else:
        options = dict(setting.options)
        if setting.seed is not None:
            options["seed"] = setting.seed
        target = None if setting.budget is None else setting.budget * visual_tokens
        layers = list(setting.layers) or None
        patch_model(model, layers, stages(setting.name), target_tokens=target, **options)
    try:
        require_patch(model).check_budget(visual_tokens)
        with merged(model, setting.lora):
            yield model
    finally:
        unpatch_model(model)


def unreachable(model: Any, setting: Setting, visual_tokens: int) -> str | None:
    """Return the reason why a setting cannot meet its budget, or why the model cannot take its
    method, or None where there is no such reason.

    Raises:
        ATPError: where something else is wrong with the setting.
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
    layers: Sequence[int],
    adapters: Sequence[str],
    drop_from: Sequence[int] = (),
    hub: Mapping[str, Any] | None = None,
) -> list[Setting]:
    """Make all settings: the references first, then the methods by falling budget. The baselines
    are always among them.

    Args:
        methods: names, or pairs as "prumerge+/atp". Each may name its own layers, as in "fastv@2"
            and "atp@1+13+25", and its own budgets, as in "atp:0.5+0.25" and "atp@1+13+25:0.06".
        budgets: shares of the visual tokens, for methods that name none.
        seeds: how many seeds a method has that draws at random.
        options: given to every method that has them; "METHOD.NAME" goes to one method alone.
        layers: for methods that prune inside the decoder and name none.
        adapters: what ``--adapters`` names.
        drop_from: decoder layers; for each there is a setting that leaves out all visual tokens
            from it on.
        hub: how adapters are read from the Hub, as :func:`recipes` takes it.

    Raises:
        ConfigError: for an unknown method, or an option that no chosen method has.
    """
    named = [_named(text, layers, budgets) for text in methods]
    known = {name for name, _, _ in named}
    named += [(name, tuple(layers), tuple(budgets)) for name in BASELINES if name not in known]
    _check_options(options, [name for name, _, _ in named])
    settings = [Setting(UNPRUNED), Setting(BLIND)]
    settings += [Setting(DROPPED, layers=(layer,)) for layer in drop_from]
    free: list[Setting] = []
    limited: list[tuple[Setting, tuple[float, ...]]] = []
    for name, own_layers, shares in dict.fromkeys(named):
        given = _options_of(name, options)
        found = make_methods(stages(name), given)
        method = found.last
        drawn = range(seeds) if "seed" in _fields_of(name) and "seed" not in given else [None]
        base = Setting(
            name, tuple(sorted(given.items())), () if found.layer is None else own_layers
        )
        drawn_each = [replace(base, seed=s) for s in drawn]
        if not method.needs_budget:
            free += drawn_each
        if method.takes_budget:
            limited += [(setting, shares) for setting in drawn_each]
    for recipe in recipes(adapters, hub):
        settings += [_trained(recipe, one) for one in recipe.trainings]
    settings += free
    for budget in sorted({share for _, shares in limited for share in shares}, reverse=True):
        settings += [replace(s, budget=budget) for s, shares in limited if budget in shares]
    return list(dict.fromkeys(settings))


def _trained(recipe: Recipe, source: str) -> Setting:
    found = find_trained(source)
    return Setting(
        f"adapter {recipe.name}",
        adapter=source,
        adapter_hash=adapter_hash(found.adapter, found.lora),
        control=recipe.control,
        trainings=recipe.source if recipe.pooled else None,
    )


def _named(
    text: str, layers: Sequence[int], budgets: Sequence[float]
) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
    """Return name, layers and budgets of a method, which has those of all methods where it names
    none.
    """
    spec = read_method_spec(text)
    if any(method_class(stage).where == "voco" for stage in spec.stages):
        raise ConfigError(
            f"--methods {text}: {spec.name} has to be trained first; give the folder of a "
            "trained one to --adapters."
        )
    return spec.name, spec.layers or tuple(layers), spec.budgets or tuple(budgets)


def known_options(name: str, given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the options of a method that differ from its defaults and can change an answer.

    Args:
        name: the name of the method.
        given: all options, as :meth:`Setting.identity` gives them.
    """
    if not set(stages(name)) <= set(available_methods()):
        return tuple(sorted(given.items()))
    default = make_methods(stages(name), {}).last.options()
    return tuple(sorted((k, v) for k, v in given.items() if v != default[k] and k not in _LOSSES))


def _fields_of(name: str) -> set[str]:
    last = stages(name)[-1]
    return (
        {entry.name for entry in fields(method_class(last))}
        if last in available_methods()
        else set()
    )


def _options_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for one method: those with its name before the dot, and those without a
    dot that it has.
    """
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
            listed = "; ".join(f"{n}: {', '.join(f) or 'none'}" for n, f in known.items())
            raise ConfigError(f"--option: no chosen method has {option!r}; they have {listed}.")
