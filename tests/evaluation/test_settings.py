"""Which settings a command line asks for, and what identifies their runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import atp_patch
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation.identity import adapter_hash, model_hash
from atp_patch.evaluation.options import drop_layers
from atp_patch.evaluation.runner import Bench, chunks
from atp_patch.evaluation.settings import (
    BLIND,
    DROPPED,
    UNPRUNED,
    Setting,
    applied,
    plan,
    unreachable,
)
from atp_patch.evaluation.tasks import choose_tasks
from atp_patch.methods import untrained_methods
from atp_patch.patching.api import is_patched, require_patch
from tests.evaluation.conftest import TOKENS


def planned(methods: list[str], **changes: Any) -> list[Setting]:
    asked: dict[str, Any] = {
        "budgets": [0.5, 0.25],
        "seeds": 2,
        "options": {},
        "layers": (4, 14, 24),
        "adapters": [],
    }
    return plan(methods, **asked | changes)


def test_references_and_baselines_are_always_there() -> None:
    names = [s.name for s in planned(["atp"])]
    at_a_budget = ["atp", "random", "random", "uniform", "downsample"]
    assert names == [UNPRUNED, BLIND, *(at_a_budget * 2)]
    assert names.count("random") == sum(s.name == "random" for s in planned(["atp", "random"]))


def test_seeds_layers_and_options() -> None:
    settings = planned(["atp", "fastv@2"], options={"score": "self", "atp.spatial_share": 0.5})
    by_name = {s.name: s for s in settings}
    assert by_name["fastv"].layers == (2,)
    assert by_name["atp"].layers == by_name["random"].layers == (4, 14, 24)
    assert dict(by_name["atp"].options) == {"score": "self", "spatial_share": 0.5}
    assert by_name["uniform"].options == ()
    assert {s.seed for s in settings if s.name == "random"} == {0, 1}
    assert by_name["atp"].seed is None
    fixed = planned(["random"], options={"seed": 7})
    assert [s.seed for s in fixed if s.name == "random"] == [None, None]


def test_a_method_without_a_budget_runs_once() -> None:
    settings = planned(["atp"], options={"thresholds": "learned"})
    assert [s.budget for s in settings if s.name == "atp"] == [None]


def test_every_method_is_taken() -> None:
    names = {s.name for s in planned(untrained_methods())}
    assert names >= set(untrained_methods())


def test_the_identity_holds_all_options() -> None:
    identity = Setting("atp", (("score", "self"),), (4,), 0.5).identity()
    assert identity["options"]["score"] == "self"
    assert identity["options"]["score_norm"] == "rank"
    assert identity["method"] == "atp"


def test_a_controls_identity_holds_what_it_was_made_from() -> None:
    own = Setting("adapter heads", adapter="heads", adapter_hash="1234")
    assert "control_questions" not in own.identity()
    assert replace(own, control="mean").identity()["control_questions"] == 352


def test_an_applied_setting_leaves_nothing_behind(bench: Bench) -> None:
    before = model_hash(bench.model)
    setting = Setting("random", layers=(2,), budget=0.5, seed=3)
    with applied(bench.model, setting, TOKENS):
        assert atp_patch.patching.api.require_patch(bench.model).config.options["seed"] == 3
    with (
        pytest.raises(RuntimeError, match="stop"),
        applied(bench.model, setting, TOKENS),
    ):
        raise RuntimeError("stop")
    assert not is_patched(bench.model)
    assert model_hash(bench.model) == before


def test_a_budget_that_cannot_be_met_is_told_apart_from_a_wrong_argument(bench: Bench) -> None:
    low = Setting("fastv", layers=(4,), budget=0.1)
    assert "least possible" in (unreachable(bench.model, low, TOKENS) or "")
    assert unreachable(bench.model, Setting("fastv", layers=(4,), budget=0.6), TOKENS) is None
    with pytest.raises(ConfigError, match="1 to 7"):
        unreachable(bench.model, Setting("fastv", layers=(9,), budget=0.6), TOKENS)


def test_hashes_see_what_changes(bench: Bench, tmp_path: Path) -> None:
    before = model_hash(bench.model)
    weight = bench.model.lm_head.weight
    value = weight.data[100, 3].item()
    weight.data[100, 3] += 1
    assert model_hash(bench.model) != before
    weight.data[100, 3] = value
    assert model_hash(bench.model) == before
    hashes = set()
    for share in (0.25, 0.5):
        atp_patch.patch_model(bench.model, [1], "atp", spatial_share=share)
        atp_patch.save_pretrained(bench.model, tmp_path)
        atp_patch.unpatch_model(bench.model)
        hashes.add(adapter_hash(str(tmp_path)))
    assert len(hashes) == 2


def test_questions_about_an_image_stay_together() -> None:
    tasks = choose_tasks(["exist", "ocr", "slanted"])
    work = chunks(tasks, "development", 9)
    asked = [example for chunk in work for example in chunk]
    assert len(asked) == len(set(asked)) == 3 * 9
    shifted = [{e.task == "slanted/ocr" for e in chunk} for chunk in work]
    assert all(len(kinds) == 1 for kinds in shifted)
    for kind in (True, False):
        numbers = [
            {e.number for e in chunk}
            for chunk, kinds in zip(work, shifted, strict=True)
            if kinds == {kind}
        ]
        assert sum(map(len, numbers)) == len(set.union(*numbers))


def test_all_visual_tokens_dropped_from_a_layer_on(bench: Bench) -> None:
    settings = planned([], drop_from=[1, 5])
    dropped = [s for s in settings if s.name == DROPPED]
    assert [s.layers for s in dropped] == [(1,), (5,)]
    assert dropped[0].identity() != dropped[1].identity()
    with applied(bench.model, dropped[1], TOKENS) as patched:
        config = require_patch(patched).config
        assert config.counts(TOKENS) == (0,)
        assert config.layers == (5,)


def test_layers_to_drop_from() -> None:
    assert drop_layers(["all"], 4) == [1, 2, 3]
    assert drop_layers(["all"], 6, silent=(1, 3)) == [1, 3, 5]
    assert drop_layers(["2", "3"], 4) == [2, 3]
    for wrong in ("0", "4", "x"):
        with pytest.raises(ConfigError, match=f"--drop-from {wrong}: give layers from 1 to 3"):
            drop_layers([wrong], 4)


def test_pairs_prune_before_and_inside(bench: Bench) -> None:
    settings = [s for s in planned(["prumerge+/atp@3", "fixed"]) if s.name == "prumerge+/atp"]
    assert [s.budget for s in settings] == [0.5, 0.25]
    assert {s.layers for s in settings} == {(3,)}
    identity = settings[0].identity()
    assert identity["options"]["score_norm"] == "rank"
    assert "neighbours" in identity["options_before"]
    with applied(bench.model, settings[0], TOKENS):
        config = require_patch(bench.model).config
        assert (config.before.method, config.method) == ("prumerge+", "atp")
        assert config.target_tokens == 0.5 * TOKENS
    with pytest.raises(ConfigError, match="then one that prunes inside"):
        planned(["atp/prumerge"])
    with pytest.raises(ConfigError, match="no method 'pru'"):
        planned(["pru/atp"])


def test_options_of_a_pair_are_those_of_the_second() -> None:
    settings = planned(["prumerge/random", "atp"], options={"score": "self"})
    pairs = [s for s in settings if s.name == "prumerge/random"]
    assert {s.seed for s in pairs} == {0, 1}
    assert {s.options for s in pairs} == {()}


def test_budgets_of_a_methods_own() -> None:
    settings = planned(["atp:0.5", "atp@1+4:0.06+0.25", "fixed"])
    found = {(s.layers, s.budget) for s in settings if s.name == "atp"}
    assert found == {((4, 14, 24), 0.5), ((1, 4), 0.06), ((1, 4), 0.25)}
    budgets = [s.budget for s in settings if s.budget is not None]
    assert budgets == sorted(budgets, reverse=True)
    assert len(settings) == len(set(settings))
    for wrong in ("atp:0", "atp:1.5", "atp:half", "atp@x"):
        with pytest.raises(ConfigError, match="after @ come layers, and after : shares"):
            planned([wrong])
