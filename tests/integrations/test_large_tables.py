"""The recipes for tables at full size: their commands, and the tables made of their results."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

from atp_patch import available_methods

LARGE = Path(__file__).parents[2] / "results" / "large"


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(LARGE))
    for name in ("run", "table"):
        sys.modules.pop(name, None)
    return importlib.import_module("run"), importlib.import_module("table")


def test_every_table_asks_every_method_at_every_budget(programs, capsys):
    run, _ = programs
    assert run.main(["llava-1.5", "--print"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    arguments = [line[line.index("--model_args") + 1] for line in lines]
    assert arguments[0] == "pretrained=llava-hf/llava-1.5-7b-hf,method=plain"
    methods = set(available_methods()) - {"voco"}
    for budget in (192, 144, 128, 88, 64):
        asked = {a for a in arguments if a.endswith(f"target_tokens={budget}")}
        assert len(asked) == len(methods)
    assert len({line[line.index("--output_path") + 1] for line in lines}) == len(lines)


def test_budgets_of_dynamic_resolution_are_shares(programs):
    run, _ = programs
    found = run.runs_of(run.table_of("qwen3-vl"), ["atp"])
    assert [r.arguments.rpartition(",")[2] for r in found[1:]] == [
        "target_share=0.25",
        "target_share=0.1",
    ]


def results(folder, values, tokens=None):
    folder.mkdir(parents=True)
    content = {"results": {task: {"exact,none": v} for task, v in values.items()}}
    if tokens is not None:
        content["throughput"] = {"avg_visual_tokens_over_layers": tokens}
    (folder / "20260101_results.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_table_says_what_was_kept(programs, tmp_path):
    _, table = programs
    out = tmp_path / "dry-run"
    results(out / "plain", {"atp_patch_exist": 1.0, "atp_patch_count": 0.8})
    results(out / "atp-144", {"atp_patch_exist": 0.9, "atp_patch_count": 0.4}, 143.9)
    results(out / "fastv-144", {"atp_patch_exist": 0.9}, 143.8)
    rows = table.table("dry-run", tmp_path, ["atp", "fastv", "random"]).splitlines()
    assert rows[2] == "| plain | - | - | 1 | 0.8 | 100.0 | - |"
    assert rows[3] == "| atp | 144 | 143.9 | 0.9 | 0.4 | 70.0 | - |"
    assert rows[4] == "| fastv | 144 | 143.8 | 0.9 | - | - | - |"
    assert len(rows) == 5  # random has no results yet


def test_a_group_without_a_score_of_its_own_gets_the_mean_of_its_tasks(programs, tmp_path):
    """As lmms-eval leaves MVBench."""
    _, table = programs
    content = {
        "results": {
            "mvbench": {" ": " ", "alias": "mvbench"},
            "mvbench_one": {"mvbench_accuracy,none": 40.0},
            "mvbench_two": {"mvbench_accuracy,none": 60.0},
            "videomme": {"videomme_perception_score,none": 55.0},
        },
        "group_subtasks": {"mvbench": ["mvbench_one", "mvbench_two"], "videomme": []},
    }
    folder = tmp_path / "video" / "plain"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    head, _, plain = table.table("video", tmp_path, []).splitlines()
    assert head == "| method | budget | tokens measured | mvbench | videomme | kept, % | paper, % |"
    assert plain == "| plain | - | - | 50 | 55 | 100.0 | - |"


def test_a_metric_that_is_not_there_is_named(programs, tmp_path):
    _, table = programs
    folder = tmp_path / "dry-run" / "plain"
    folder.mkdir(parents=True)
    content = {"results": {"atp_patch_exist": {"other,none": 1.0}}}
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit, match="no metric exact of atp_patch_exist"):
        table.table("dry-run", tmp_path, ["atp"])
