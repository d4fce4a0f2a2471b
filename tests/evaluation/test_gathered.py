"""Summaries read again are what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atp_patch.builtin import load_builtin
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation import command, runner
from atp_patch.evaluation.gathered import SUMMARY, gather
from atp_patch.evaluation.identity import model_hash

ROOT = Path(__file__).parents[2]
WORKING = (0, 3, 6, 9, 13, 18, 23, 28)  # of the first built-in model
TASKS = ("exist", "colour")


def ask(out: Path, *argv: str, questions: int = 2) -> list[dict[str, Any]]:
    given = ["--tasks", ",".join(TASKS), "--seeds", "2", "--split", "development", *argv]
    given += ["--questions", str(questions), "--no-plots", "--out", str(out)]
    assert command.main(given) == 0
    return rows_in(out)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SUMMARY).read_text().splitlines()]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    methods = "atp@1+4+10:0.25+0.02,prumerge+,random@1+4+10,uniform@1+4+10"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "CONTROL_QUESTIONS", 2)  # how well controls match plays no part
        ask(folder, "--methods", methods, "--budgets", "0.25", "--adapters", "atp25,atp25~mean")
    return folder


def test_one_summary_comes_out_as_it_went_in(first: Path, tmp_path: Path) -> None:
    argv = ["--summaries", str(first), "--no-plots", "--out", str(tmp_path / "again")]
    assert command.main(argv) == 0
    before, after = rows_in(first), rows_in(tmp_path / "again")
    assert len(after) == len(before)
    for row in before:
        assert row in after
    told, again = ((f / command.TABLE).read_text() for f in (first, tmp_path / "again"))
    assert sorted(again.splitlines()[1:]) == sorted(told.splitlines()[1:])
    adapter = next(row for row in after if row["method"] == "adapter atp25")
    assert len(adapter["adapter_hash"]) == 12
    assert adapter["working_tokens"] > adapter["average_tokens"]


def test_two_summaries_make_one(first: Path, tmp_path: Path) -> None:
    ask(tmp_path, "--methods", "fixed@1+4+10,uniform@1+4+10", "--budgets", "0.25")
    model, _ = load_builtin()
    rows = gather([first, tmp_path], model_hash(model), WORKING)
    names = [row.setting.name for row in rows]
    assert names.count("uniform") == names.count("unpruned") == 1
    assert {"fixed", "atp", "adapter atp25"} <= set(names)
    assert not any(row.against for row in rows)
    assert names[-1] == "atp"  # what could not be reached
    assert rows[-1].unreachable is not None


def test_what_does_not_go_together_is_refused(first: Path, tmp_path: Path) -> None:
    model, _ = load_builtin()
    known = model_hash(model)
    with pytest.raises(ConfigError, match="another model"):
        gather([first], "0" * 12, WORKING)
    with pytest.raises(ConfigError, match="cannot be read"):
        gather([tmp_path / "nothing"], known, WORKING)
    fewer = tmp_path / "fewer"
    ask(fewer, "--methods", "uniform", "--budgets", "0.5", questions=1)
    with pytest.raises(ConfigError, match="other questions"):
        gather([first, fewer], known, WORKING)
    for change, why in (
        ({"split": "test"}, "another split"),
        ({"accuracy": dict.fromkeys(TASKS, 0.125)}, "measure them anew"),
    ):
        changed = tmp_path / why.replace(" ", "-")
        changed.mkdir()
        lines = [json.dumps(row | change) for row in rows_in(first)]
        (changed / SUMMARY).write_text("\n".join(lines) + "\n")
        with pytest.raises(ConfigError, match=why):
            gather([first, changed], known, WORKING)


@pytest.mark.parametrize("name", ["builtin", "dynamic", "depth", "shifted", "thresholds-15"])
def test_what_the_repository_holds_can_be_read(name: str) -> None:
    rows = rows_in(ROOT / "results" / name)
    found = gather([ROOT / "results" / name], rows[0]["model_hash"], WORKING)
    told = [json.loads(json.dumps(row.to_json(), allow_nan=False)) for row in found]
    for before in rows:  # what was recorded stays as it was, whatever defaults are today
        assert any(before.items() <= after.items() for after in told)
    assert all(row["working_tokens"] is not None for row in told if row["unreachable"] is None)
