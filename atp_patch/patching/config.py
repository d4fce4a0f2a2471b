"""The validated configuration of a patch, which is written to JSON and read from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any

from atp_patch.contract.arguments import MOST_TOKENS, as_kind, check_fields, shown
from atp_patch.contract.errors import BudgetError, ConfigError, WeightsError
from atp_patch.families import scaled_layers
from atp_patch.maths import average_tokens, keep_counts, minimum_target, target_counts

CONFIG_VERSION = 1
DEFAULT_SHARE = 0.25
_BUDGETS = ("keep", "target_tokens", "target_share")
_PAPER_TOKENS = 576


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter was made for.

    Attributes:
        family: name of the model's family.
        num_layers: number of decoder layers.
        hidden_size: hidden size of the decoder.
    """

    family: str
    num_layers: int
    hidden_size: int

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Stage:
    """A method that prunes before the decoder.

    Attributes:
        method: name of the method.
        options: values of the method's fields by name.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PruningConfig:
    """How a model is pruned, except for learned weights.

    Attributes:
        method: name of the method that prunes inside the decoder, or None.
        layers: the decoder layers, from 1, before which tokens are pruned; strictly rising.
        base: the model that the configuration is for.
        keep: for each pruning layer, the share of the remaining visual tokens that it keeps, or
            None. If only ``before`` prunes, this is its one share.
        target_tokens: the number of visual tokens averaged over all decoder layers, or None.
        target_share: the same as a share of the sample's visual tokens, or None.
        min_tokens: number of visual tokens that every sample keeps at least.
        min_tokens_per_image: number of visual tokens that every image keeps at least.
        options: values of the method's fields by name.
        before: the method that prunes before the decoder, or None.
        rope_2d: whether visual tokens are rotated by row and column.
        prune_marks: whether newline and class tokens, which belong to no grid, may be pruned too.
    """

    method: str | None
    layers: tuple[int, ...]
    base: BaseModel
    keep: tuple[float, ...] | None = None
    target_tokens: float | None = None
    target_share: float | None = None
    min_tokens: int = 1
    min_tokens_per_image: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    before: Stage | None = None
    rope_2d: bool = False
    prune_marks: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method is not None:
            self._check_layers()
        elif self.layers or self.options or self.before is None:
            raise ConfigError(
                "layers and options belong to a method that prunes inside the decoder."
            )
        budgets = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ConfigError(
                f"{budgets[0]} and {budgets[1]} both set the budget; give one of them."
            )
        if self.keep is not None:
            if len(self.keep) != max(len(self.layers), 1):
                raise ConfigError(
                    f"keep has {len(self.keep)} shares for {len(self.layers)} pruning layers; "
                    f"give one number, or one for each layer."
                )
            if not all(0 < share <= 1 for share in self.keep):
                raise ConfigError(
                    f"keep={shown(list(self.keep))}: every share must be above 0 and at most 1."
                )
        if self.target_tokens is not None and not 0 < self.target_tokens <= MOST_TOKENS:
            raise BudgetError(
                f"target_tokens={self.target_tokens} must be above 0 and at most {MOST_TOKENS}."
            )
        if self.target_share is not None and not 0 < self.target_share <= 1:
            raise BudgetError(f"target_share={self.target_share} must be above 0 and at most 1.")
        if self.prune_marks and (self.rope_2d or self.before is not None):
            raise ConfigError(
                "prune_marks goes with methods that prune inside the decoder, without rope_2d: "
                "marks have no row and column by which they could be rotated or merged."
            )
        for name in ("min_tokens", "min_tokens_per_image"):
            if not 0 <= getattr(self, name) <= MOST_TOKENS:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must be at least 0 and at most {MOST_TOKENS}."
                )

    def _check_layers(self) -> None:
        last = self.base.num_layers - 1
        proportional = scaled_layers(self.base.num_layers)
        if not self.layers:
            raise ConfigError("layers is empty; name the decoder layers to prune before.")
        for layer in self.layers:
            if not 1 <= layer <= last:
                why = (
                    "layer 0 has no layer before it to score from"
                    if layer == 0
                    else f"the decoder has layers 1 to {last} to prune before"
                )
                raise ConfigError(
                    f"layers={shown(list(self.layers))}: {why}. In proportion to the paper's "
                    f"choice: layers={proportional}."
                )
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"layers={shown(list(self.layers))} must rise from one to the next.")

    @property
    def has_budget(self) -> bool:
        """Whether ``keep``, ``target_tokens`` or ``target_share`` was given."""
        return any(getattr(self, name) is not None for name in _BUDGETS)

    @property
    def average_share(self) -> float:
        """The share of the visual tokens, averaged over all layers, where no number was given."""
        return DEFAULT_SHARE if self.target_share is None else self.target_share

    def counts(self, total: int, images: int = 1, whole: int | None = None) -> tuple[int, ...]:
        """Return the number of visual tokens left after each pruning layer.

        Args:
            total: number of visual tokens that enter the decoder.
            images: number of images that they belong to.
            whole: number of visual tokens of which ``target_share`` or the default budget is a
                share, if it is not ``total``.

        Raises:
            BudgetError: if the budget is below what the layers before the first pruning
                layer alone cost.
        """
        if total == 0:
            return (0,) * len(self.layers)
        if self.method is None:
            return ()
        minimum = min(max(self.min_tokens, images * self.min_tokens_per_image), total)
        if self.keep is not None:
            return keep_counts(total, self.keep, minimum)
        num_layers = self.base.num_layers
        target = self.target_tokens
        if target is None:
            target = self.average_share * (total if whole is None else whole)
        minimum = max(minimum, 1)
        lowest = minimum_target(total, self.layers, num_layers, minimum)
        if self.before is not None and not self.has_budget:
            target = max(target, lowest)  # the budget was not given by the user
        if target < lowest:
            asked = f"the default budget, a quarter of the visual tokens ({target:g})"
            if self.target_share is not None:
                asked = f"target_share={self.target_share:g} ({target:g} visual tokens)"
            elif self.target_tokens is not None:
                asked = f"target_tokens={target:g}"
            raise BudgetError(
                f"{asked} is below the least possible average of {lowest:.1f}: {self.layers[0]} of "
                f"{num_layers} layers run on all {total} visual tokens before the first pruning. "
                f"Give a larger budget, keep=, or an earlier first layer."
            )
        return target_counts(total, self.layers, num_layers, target, minimum=minimum)

    def goal(self, total: float) -> float:
        """Return the number of visual tokens, averaged over all layers, that training aims at.

        Args:
            total: number of visual tokens that enter the decoder.
        """
        if self.target_tokens is not None:
            return self.target_tokens
        if self.keep is None:
            return self.average_share * total
        counts = [total * prod(self.keep[: step + 1]) for step in range(len(self.keep))]
        return average_tokens(total, counts, self.layers, self.base.num_layers)

    def shares(self, total: int | None) -> tuple[float, ...]:
        """Return the share of all visual tokens that the budget leaves after each pruning layer.

        Args:
            total: number of visual tokens of an image, or None if it is not known. Then
                ``target_tokens`` cannot be expressed in shares, and those of a quarter are
                returned.
        """
        visual_tokens = _PAPER_TOKENS if total is None else total
        if self.keep is not None:
            return tuple(count / visual_tokens for count in keep_counts(visual_tokens, self.keep))
        given = None if total is None else self.target_tokens
        target = self.average_share * visual_tokens if given is None else given
        num_layers = self.base.num_layers
        target = max(target, minimum_target(visual_tokens, self.layers, num_layers))
        counts = target_counts(visual_tokens, self.layers, num_layers, target)
        return tuple(count / visual_tokens for count in counts)

    @property
    def name(self) -> str:
        """The names of the methods, joined for display."""
        names = [None if self.before is None else self.before.method, self.method]
        return " + ".join(name for name in names if name is not None)

    def to_json(self) -> str:
        """Return the JSON of an adapter's configuration file."""
        return json.dumps({"version": CONFIG_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> PruningConfig:
        """Read a configuration that :meth:`to_json` wrote.

        Args:
            text: the JSON.
            source: the name of the file in error messages.

        Raises:
            WeightsError: if the JSON is broken, of another version, or has unknown or missing keys,
                or if it holds a value that ``patch_model`` would refuse as an argument.
        """
        try:
            data = _current(parse_table(text))
            data.pop("made_with", None)  # what an adapter adds about the model it was made for
            for younger in ("rope_2d", "prune_marks"):  # the first adapters do not have these
                data.setdefault(younger, False)
            data.setdefault("target_share", None)
            data = entries("", data, cls)
            data["base"] = BaseModel(**entries("base", data["base"], BaseModel))
            if data["before"] is not None:
                data["before"] = Stage(**entries("before", data["before"], Stage))
            return cls(**data)
        except ConfigError as error:
            raise WeightsError(f"{source}: {error}") from error


def parse_table(text: str) -> dict[str, Any]:
    """Read the table that a JSON text holds.

    Raises:
        ConfigError: if the JSON is broken or holds NaN or infinity.
    """

    def refuse(constant: str) -> None:
        raise ConfigError(f"{constant} is no number of JSON.")

    try:
        data = json.loads(text, parse_constant=refuse)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError("the JSON holds brackets within brackets without end.") from error
    except ValueError as error:  # broken JSON, or an integer of thousands of digits
        raise ConfigError(f"the file is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise ConfigError("the file holds no configuration.")
    return data


def _current(data: dict[str, Any]) -> dict[str, Any]:
    """Check that a configuration has the current version, and return it without the version."""
    version = data.pop("version", None)
    if as_kind("version", version, "int | None") != CONFIG_VERSION:
        raise ConfigError(
            f"the configuration has version {version}; this atp_patch reads version "
            f"{CONFIG_VERSION}. Install the atp_patch that wrote it, or save the adapter anew."
        )
    return data


def entries(name: str, data: Any, cls: type) -> dict[str, Any]:
    """Return a table after checking that its keys are exactly the fields of a dataclass."""
    table: dict[str, Any] = as_kind(name, data, "dict[str, Any]")
    known = {entry.name for entry in fields(cls)}
    if set(table) != known:
        unknown, missing = sorted(set(table) - known), sorted(known - set(table))
        within = f" in {name}" if name else ""
        raise ConfigError(f"unknown keys {shown(unknown)}, missing keys {shown(missing)}{within}.")
    return table
