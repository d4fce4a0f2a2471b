"""What was asked of ``patch_model``: frozen, validated, to and from JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any

from atp_patch.contract.arguments import as_layers
from atp_patch.contract.errors import BudgetError, ConfigError, WeightsError
from atp_patch.families import scaled_layers
from atp_patch.maths import average_tokens, keep_counts, least_target, target_counts

CONFIG_VERSION = 1
DEFAULT_SHARE = 0.25
_PAPER_TOKENS = 576


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter was made for."""

    family: str
    num_layers: int
    hidden_size: int


@dataclass(frozen=True)
class Stage:
    """A method that prunes before the decoder, and its options."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PruningConfig:
    """Everything but the weights that says how a model is pruned.

    Attributes:
        method, options: a method's name and its fields; None where nothing is pruned inside the
            decoder.
        layers: decoder layers, from 1, before which tokens are pruned; strictly rising.
        before: what prunes before the decoder, or None.
        keep: share of the surviving visual tokens that each pruning layer keeps, or None. Alone,
            ``before`` takes the budget: ``keep`` is then one share.
        target_tokens: visual tokens averaged over all decoder layers, or None.
        min_tokens, min_tokens_per_image: what every pruning layer leaves at least.
        base: the model it is for.
        rope_2d: whether visual tokens turn with row and column.
        prune_marks: whether newline and class tokens, which stand in no grid, may go too.
    """

    method: str | None
    layers: tuple[int, ...]
    base: BaseModel
    keep: tuple[float, ...] | None = None
    target_tokens: float | None = None
    min_tokens: int = 1
    min_tokens_per_image: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    before: Stage | None = None
    rope_2d: bool = False
    prune_marks: bool = False

    def __post_init__(self) -> None:
        if self.method is not None:
            self._check_layers()
        elif self.layers or self.before is None:
            raise ConfigError("layers belong to a method that prunes inside the decoder.")
        if self.keep is not None and self.target_tokens is not None:
            raise ConfigError("keep and target_tokens both set the budget; give one of them.")
        if self.keep is not None:
            if len(self.keep) != max(len(self.layers), 1):
                raise ConfigError(
                    f"keep has {len(self.keep)} shares for {len(self.layers)} pruning layers; "
                    f"give one number, or one a layer."
                )
            if not all(0 < share <= 1 for share in self.keep):
                raise ConfigError(
                    f"keep={list(self.keep)}: every share must be above 0 and at most 1."
                )
        if self.target_tokens is not None and not self.target_tokens > 0:
            raise BudgetError(f"target_tokens={self.target_tokens} must be above 0.")
        if self.prune_marks and (self.rope_2d or self.before is not None):
            raise ConfigError(
                "prune_marks goes with methods that prune inside the decoder, without rope_2d: "
                "marks have no row and column to turn with, and none to be merged by."
            )
        if self.min_tokens < 0 or self.min_tokens_per_image < 0:
            raise ConfigError("min_tokens and min_tokens_per_image must be at least 0.")

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
                    f"layers={list(self.layers)}: {why}. In proportion to the paper's choice: "
                    f"layers={proportional}."
                )
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"layers={list(self.layers)} must rise from one to the next.")

    @property
    def has_budget(self) -> bool:
        """Whether one was given."""
        return self.keep is not None or self.target_tokens is not None

    def counts(self, total: int, images: int = 1) -> tuple[int, ...]:
        """Visual tokens left after each pruning layer, of ``total`` in ``images`` images.

        Raises:
            BudgetError: where ``target_tokens`` is below what the layers before the first pruning
                cost.
        """
        if total == 0:
            return (0,) * len(self.layers)
        if self.method is None:
            return ()
        minimum = min(max(self.min_tokens, images * self.min_tokens_per_image), total)
        if self.keep is not None:
            return keep_counts(total, self.keep, minimum)
        num_layers = self.base.num_layers
        target = DEFAULT_SHARE * total if self.target_tokens is None else self.target_tokens
        minimum = max(minimum, 1)
        least = least_target(total, self.layers, num_layers, minimum)
        if self.before is not None and self.target_tokens is None:
            target = max(target, least)  # how few tokens are left here is not the user's choice
        if target < least:
            asked = (
                f"target_tokens={target:g}"
                if self.target_tokens is not None
                else f"the default budget, a quarter of the visual tokens ({target:g})"
            )
            raise BudgetError(
                f"{asked} is below the least possible average of {least:.1f}: {self.layers[0]} of "
                f"{num_layers} layers run on all {total} visual tokens before the first pruning. "
                f"Give target_tokens of at least that, keep=, or an earlier first layer."
            )
        return target_counts(total, self.layers, num_layers, target, minimum=minimum)

    def goal(self, total: float) -> float:
        """The budget of learned thresholds: tokens averaged over all layers, of ``total``."""
        if self.target_tokens is not None:
            return self.target_tokens
        if self.keep is None:
            return DEFAULT_SHARE * total
        counts = [total * prod(self.keep[: step + 1]) for step in range(len(self.keep))]
        return average_tokens(total, counts, self.layers, self.base.num_layers)

    def shares(self, total: int | None) -> tuple[float, ...]:
        """Of all visual tokens, what the budget leaves after each pruning layer.

        Args:
            total: visual tokens of an image. Where it is not known, ``target_tokens`` says nothing
                about shares, and they are those of a quarter.
        """
        places = _PAPER_TOKENS if total is None else total
        if self.keep is not None:
            return tuple(count / places for count in keep_counts(places, self.keep))
        asked = None if total is None else self.target_tokens
        target = DEFAULT_SHARE * places if asked is None else asked
        num_layers = self.base.num_layers
        target = max(target, least_target(places, self.layers, num_layers))
        counts = target_counts(places, self.layers, num_layers, target)
        return tuple(count / places for count in counts)

    @property
    def name(self) -> str:
        """The methods' names, for people."""
        names = [None if self.before is None else self.before.method, self.method]
        return " + ".join(name for name in names if name is not None)

    def to_json(self) -> str:
        """The JSON of an adapter's configuration file."""
        return json.dumps({"version": CONFIG_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> PruningConfig:
        """Read :meth:`to_json` back; ``source`` names the file in errors.

        Raises:
            WeightsError: for broken JSON, another version, unknown or missing keys.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise WeightsError(f"{source} is not JSON ({error}).") from error
        if not isinstance(data, dict):
            raise WeightsError(f"{source} holds no configuration.")
        version = data.pop("version", None)
        if version != CONFIG_VERSION:
            raise WeightsError(
                f"{source} has configuration version {version!r}; this atp_patch reads version "
                f"{CONFIG_VERSION}. Install the atp_patch that wrote it, or save the adapter anew."
            )
        for younger in ("rope_2d", "prune_marks"):  # than the first adapters
            data.setdefault(younger, False)
        known = {entry.name for entry in fields(cls)}
        if set(data) != known:
            unknown, missing = sorted(set(data) - known), sorted(known - set(data))
            raise WeightsError(f"{source}: unknown keys {unknown}, missing keys {missing}.")
        if not isinstance(data["options"], dict):
            raise WeightsError(f"{source}: options={data['options']!r} is no table of options.")
        try:
            base = BaseModel(**data.pop("base"))
            layers, keep, before = (data.pop(name) for name in ("layers", "keep", "before"))
            return cls(
                base=base,
                layers=as_layers(layers),
                keep=None if keep is None else tuple(keep),
                before=None if before is None else Stage(**before),
                **data,
            )
        except (TypeError, ConfigError) as error:
            raise WeightsError(f"{source}: {error}") from error
