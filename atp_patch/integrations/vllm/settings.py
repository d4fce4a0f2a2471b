"""What the plugin is told: a method, its options, and how many tokens of each picture stay.

vLLM sizes the places of a picture in the prompt, and the blocks of its cache, before the picture
has been looked at. A method can be served if it keeps a number that follows from the picture's size
alone, and if it chooses before the decoder by the picture alone: vLLM shares the features of a
picture between all prompts that hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from atp_patch.contract import DoorMethod, LayerMethod, Method, PictureMethod, TowerMethod
from atp_patch.contract.arguments import MOST_TOKENS, as_kind, shown
from atp_patch.contract.errors import ConfigError
from atp_patch.integrations.vllm.baselines import BASELINES, BaselineAtDoor
from atp_patch.methods import CDPruner, make_method
from atp_patch.tools.arguments import named_value

VARIABLE = "ATP_PATCH_VLLM"
EXAMPLE = f'{VARIABLE}="method=divprune,keep=0.25"'
SERVED_METHODS = (
    "divprune, scope, prunesid, visionzip, fastervlm, vispruner, hiprune, prumerge, prumerge+, "
    "random, uniform"
)


@dataclass(frozen=True)
class Settings:
    """A method and a budget.

    Attributes:
        method: the method, which prunes before the decoder.
        keep: the share of each picture's visual tokens that stay, or None.
        tokens_per_image: the number of each picture's visual tokens that stay, or None; a picture
            that has fewer keeps all.
    """

    method: DoorMethod | TowerMethod
    keep: float | None = None
    tokens_per_image: int | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.tokens_per_image is None):
            raise ConfigError(
                f"{VARIABLE}: give one of keep (a share of each picture's tokens) and "
                f"tokens_per_image (their number), as in {EXAMPLE}."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"{VARIABLE}: keep={self.keep} must be above 0 and at most 1.")
        number = self.tokens_per_image
        if number is not None and not 1 <= number <= MOST_TOKENS:
            raise ConfigError(f"{VARIABLE}: tokens_per_image={number} must be at least 1.")

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read settings as they are written in the environment.

        >>> found = Settings.parse("method=divprune,keep=0.25")
        >>> found.method.name, found.count(576)
        ('divprune', 144)

        Raises:
            ConfigError: where the text says no method that vLLM can serve and no budget for it.
        """
        given = _pairs(text)
        name = given.pop("method", None)
        if not isinstance(name, str):
            raise ConfigError(f"{VARIABLE}={shown(text)} names no method; write {EXAMPLE}.")
        try:
            keep = as_kind("keep", given.pop("keep", None), "float | None")
            tokens = as_kind("tokens_per_image", given.pop("tokens_per_image", None), "int | None")
            return cls(_served(name, given), keep, tokens)
        except ConfigError as error:
            said = str(error)
            raise ConfigError(
                said if said.startswith(VARIABLE) else f"{VARIABLE}: {said}"
            ) from error

    def count(self, total: int) -> int:
        """The number of tokens that stay of a picture with so many; at least 1 of any."""
        if self.tokens_per_image is not None:
            return min(self.tokens_per_image, total)
        assert self.keep is not None, "there is one budget or the other"
        return min(max(round(self.keep * total), 1), total)

    @property
    def reads_tower(self) -> bool:
        """Whether the method needs the attention of the vision tower."""
        return isinstance(self.method, TowerMethod) or bool(self.method.tower_blocks)


def _pairs(text: str) -> dict[str, Any]:
    """The names and values of ``name=value,name=value``."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        try:
            name, value = named_value(part)
        except ValueError:
            name, value = "", ""
        if not name or value == "" or name in found:
            raise ConfigError(
                f"{VARIABLE}={shown(text)}: {shown(part)} is not one name=value; write {EXAMPLE}."
            )
        found[name] = value
    return found


def _served(name: str, options: Mapping[str, Any]) -> DoorMethod | TowerMethod:
    """Make a method that vLLM can serve.

    Raises:
        ConfigError: for a method that it cannot serve, with the reason; where an option is wrong.
    """
    if name in BASELINES:
        return BaselineAtDoor(baseline=name, settings=dict(options))
    method: Method = make_method(name, dict(options))
    if isinstance(method, CDPruner):
        _refuse(name, "it reads the question, and vLLM shares a picture's features between prompts")
    if isinstance(method, LayerMethod):
        _refuse(
            name,
            "it prunes inside the decoder, and vLLM caches keys of as many tokens in every layer",
        )
    if isinstance(method, PictureMethod):
        _refuse(name, "vLLM itself shrinks pictures: see its --mm-processor-kwargs")
    if not isinstance(method, (DoorMethod, TowerMethod)):
        _refuse(name, "it does not prune by choosing among a picture's tokens")
    if not method.takes_budget:
        _refuse(name, "it decides itself how many tokens stay, which vLLM must know before it runs")
    if isinstance(method, DoorMethod) and method.share is not None:
        raise ConfigError("leave out share, which is for a pair of methods; give keep.")
    return method


def _refuse(name: str, reason: str) -> NoReturn:
    raise ConfigError(f"method={name} cannot be served by vLLM: {reason}. Use {SERVED_METHODS}.")
