"""Arguments are checked, budgets are met, JSON comes back as it went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

import atp_patch
from atp_patch import scaled_layers
from atp_patch.families import FAMILIES
from atp_patch.patching.api import require_patch
from atp_patch.patching.config import BaseModel, PruningConfig
from tests.helpers import tiny
from tests.helpers.inputs import SINGLE, batch
from tests.helpers.run import forward

BASE = BaseModel("llava", 32, 4096)


def config(**changes: object) -> PruningConfig:
    settings: dict[str, object] = {"method": "atp", "layers": (4, 14, 24), "base": BASE}
    return PruningConfig(**{**settings, **changes})  # type: ignore[arg-type]


def average(total: int, counts: tuple[int, ...], layers: tuple[int, ...], depth: int) -> float:
    entering = []
    for layer in range(depth):
        left = total
        for place, count in zip(layers, counts, strict=True):
            if layer >= place:
                left = count
        entering.append(left)
    return sum(entering) / depth


def test_the_papers_budget_gives_the_papers_counts() -> None:
    counts = config(target_tokens=143.9).counts(576)
    assert all(abs(a - b) <= 1 for a, b in zip(counts, (126, 88, 20), strict=True))


@pytest.mark.parametrize("total", [40, 81, 144, 256, 576, 1500, 2880])
@pytest.mark.parametrize("share", [0.15, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("layers", "depth"), [((4, 14, 24), 32), ((1, 13, 25), 32), ((2,), 28)])
def test_target_is_held_within_two_percent_or_one_token(
    total: int, share: float, layers: tuple[int, ...], depth: int
) -> None:
    target = share * total
    made = config(layers=layers, base=BaseModel("llava", depth, 64), target_tokens=target)
    try:
        counts = made.counts(total)
    except atp_patch.BudgetError:
        assert target < average(total, (1,) * len(layers), layers, depth) + 1e-9
        return
    assert abs(average(total, counts, layers, depth) - target) <= max(1.0, 0.02 * target)
    assert list(counts) == sorted(counts, reverse=True)


def test_without_a_budget_a_quarter_is_kept() -> None:
    assert average(576, config().counts(576), (4, 14, 24), 32) == pytest.approx(144, abs=1)


@pytest.mark.parametrize(("target", "minimum"), [(160, 64), (144, 40), (200, 100)])
def test_a_minimum_costs_no_token_more(target: float, minimum: int) -> None:
    counts = config(target_tokens=target, min_tokens=minimum).counts(576)
    assert min(counts) >= minimum
    assert average(576, counts, (4, 14, 24), 32) == pytest.approx(target, abs=0.5)


def test_minimum_of_each_image_wins_over_the_budget() -> None:
    counts = config(keep=(0.01,) * 3, min_tokens_per_image=5).counts(100, images=4)
    assert counts == (20, 20, 20)
    assert config(keep=(0.01,) * 3, min_tokens=7).counts(100) == (7, 7, 7)
    assert config(keep=(0.01,) * 3, min_tokens=7).counts(3) == (3, 3, 3)


def test_a_budget_below_the_unpruned_layers_names_the_least_possible() -> None:
    with pytest.raises(atp_patch.BudgetError, match=r"least possible average of 72\.9"):
        config(target_tokens=60).counts(576)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 4)}, r"layer 0 has no layer before it.*\[4, 14, 24\]"),
        ({"layers": (4, 32)}, "layers 1 to 31"),
        ({"layers": (-1,)}, "layers 1 to 31"),
        ({"layers": ()}, "empty"),
        ({"layers": (14, 4)}, "must rise"),
        ({"layers": (4, 4)}, "must rise"),
        ({"keep": (0.5,)}, "1 shares for 3"),
        ({"keep": (0.5, 0.0, 0.5)}, "above 0"),
        ({"keep": (0.5, 1.5, 0.5)}, "at most 1"),
        ({"target_tokens": -3}, "above 0"),
        ({"target_tokens": float("nan")}, "target_tokens=nan: give a finite number"),
        ({"keep": (0.5,) * 3, "target_tokens": 10}, "give one of them"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_wrong_arguments_name_the_mend(changes: dict[str, object], message: str) -> None:
    with pytest.raises(atp_patch.ConfigError, match=message) as caught:
        config(**changes)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, atp_patch.ATPError)


def test_scaled_layers_are_proportional_and_legal() -> None:
    assert scaled_layers(32) == [4, 14, 24]
    assert scaled_layers(28) == [4, 12, 21]
    for depth in range(2, 90):
        layers = scaled_layers(depth)
        assert layers == sorted(set(layers))
        assert 1 <= layers[0] <= layers[-1] < depth


@pytest.mark.parametrize(
    ("depth", "late", "places"),
    [
        (32, 0, (4, 14, 24)),
        (32, 3, (4, 14, 24)),
        (28, 0, (4, 12, 21)),
        (40, 0, (5, 18, 30)),
        (24, 3, (3, 10, 18)),
        (16, 3, (3, 7, 12)),
        (8, 2, (2, 4, 6)),
        (8, 5, (5, 6)),
        (2, 0, (1,)),
    ],
)
def test_default_layers_are_in_proportion_and_where_the_family_can_be_pruned(
    depth: int, late: int, places: tuple[int, ...]
) -> None:
    family = replace(FAMILIES[0], late_layers=lambda config: late)
    assert family.default_layers(None, depth) == places
    family.check_layers(None, places)


ODD_LISTS = ([1], [7], [5, 6], [1, 3, 7], (2, 3, 4, 5, 6, 7))


@pytest.mark.parametrize("given", ODD_LISTS, ids=str)
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_an_explicit_list_of_layers_is_never_changed(kind: str, given: Sequence[int]) -> None:
    model = atp_patch.patch_model(tiny.tiny_model(kind), given, "fastv", keep=0.75)
    assert require_patch(model).config.layers == tuple(given)
    forward(model, batch(model, SINGLE))
    assert tuple(atp_patch.last_trace(model).layers) == tuple(given)


@pytest.mark.parametrize(("given", "late"), [([1, 4], 3), ([2], 3), ([3, 5], 4)])
def test_a_list_that_begins_too_early_is_refused_not_moved(given: list[int], late: int) -> None:
    family = replace(FAMILIES[0], late_layers=lambda config: late)
    with pytest.raises(atp_patch.ConfigError, match=f"no token can go before layer {late}"):
        family.check_layers(None, given)


@pytest.mark.parametrize(
    ("depth", "places"), [(32, (4, 16, 24)), (40, (8, 20, 32)), (8, (4,)), (5, (4,))]
)
def test_default_layers_stand_behind_layers_that_attend(
    depth: int, places: tuple[int, ...]
) -> None:
    """Every fourth layer attends, and no layer is directly behind the last one."""
    types = ["linear_attention" if (layer + 1) % 4 else "full_attention" for layer in range(depth)]
    text = SimpleNamespace(layer_types=types)
    config = SimpleNamespace(get_text_config=lambda: text)
    family = replace(FAMILIES[0], keeps_state=True)
    assert family.default_layers(config, depth) == places
    text.layer_types = types[:3] * 2
    with pytest.raises(atp_patch.UnsupportedModelError, match="no layer of this decoder attends"):
        family.default_layers(config, 6)


def test_json_round_trip() -> None:
    made = config(keep=(0.5, 0.25, 0.125), options={"score": "mean"})
    assert PruningConfig.from_json(made.to_json(), "here") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"layers": [0]}, "layer 0"),
        ({"base": {"family": "llava"}}, "missing"),
    ],
)
def test_foreign_json_is_refused(change: dict[str, object], message: str) -> None:
    data = {**json.loads(config().to_json()), **change}
    with pytest.raises(atp_patch.WeightsError, match=message):
        PruningConfig.from_json(json.dumps(data), "here")


def test_missing_keys_and_broken_json_are_refused() -> None:
    data = json.loads(config().to_json())
    del data["layers"]
    with pytest.raises(atp_patch.WeightsError, match=r"missing keys \['layers'\]"):
        PruningConfig.from_json(json.dumps(data), "here")
    for text in ("{", "[]", '"text"'):
        with pytest.raises(atp_patch.WeightsError):
            PruningConfig.from_json(text, "here")
