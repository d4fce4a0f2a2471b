"""A killed run goes on where it was and equals one that was never killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation import command
from atp_patch.evaluation.store import Answer, RunFile

ASKED = "--methods fastv --budgets 0.5,0.03 --tasks exist,relation,slanted --seeds 2"


class Killed(BaseException):
    """What a kill looks like from inside."""


def evaluate(model: Path, out: Path, questions: int = 8) -> None:
    argv = f"--model {model} {ASKED} --questions {questions} --split development --no-plots"
    assert command.main([*argv.split(), "--out", str(out)]) == 0


def files(out: Path) -> dict[str, str]:
    """Everything that a run wrote."""
    found = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_text(encoding="utf-8") for path in found}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(folder, out)
    return files(out)


@pytest.mark.parametrize("lines", [0, 9])
def test_a_killed_run_equals_an_uninterrupted_one(
    lines: int, folder: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    add, written = RunFile.add, []

    def add_until_killed(self: RunFile, chunk: int, results: dict[str, Any]) -> None:
        if len(written) == lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write('{"chunk":0,"tasks":{"exi')  # half a line
            raise Killed
        add(self, chunk, results)
        written.append(self.path)

    monkeypatch.setattr(RunFile, "add", add_until_killed)
    with pytest.raises(Killed):
        evaluate(folder, tmp_path)
    monkeypatch.undo()
    assert files(tmp_path) != whole
    evaluate(folder, tmp_path)
    assert files(tmp_path) == whole


def test_a_finished_run_answers_nothing_again(
    folder: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    evaluate(folder, tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("answered again")

    monkeypatch.setattr("atp_patch.evaluation.runner.answered", never)
    monkeypatch.setattr("atp_patch.evaluation.command.today", lambda: "another day")
    monkeypatch.setattr("atp_patch.evaluation.command.machine", lambda _: "another machine")
    evaluate(folder, tmp_path)
    assert files(tmp_path) == whole


def test_more_questions_add_to_what_is_there(
    folder: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    evaluate(folder, tmp_path, questions=5)
    evaluate(folder, tmp_path)
    assert files(tmp_path)["table.md"] == whole["table.md"]
    evaluate(folder, tmp_path, questions=5)
    few = [json.loads(line) for line in files(tmp_path)["summary.jsonl"].splitlines()]
    assert {n for row in few for n in row["questions"].values()} == {5}


def test_the_model_s_answers_are_not_all_alike(whole: dict[str, str]) -> None:
    """Else the tests above would see little."""
    rows = [json.loads(line) for line in whole["summary.jsonl"].splitlines()]
    accuracies = {v for row in rows for v in row["accuracy"].values()}
    assert len(accuracies) > 3


def test_every_row_says_what_it_is_of(whole: dict[str, str]) -> None:
    rows = [json.loads(line) for line in whole["summary.jsonl"].splitlines()]
    keys = {"model", "model_hash", "adapter", "adapter_hash", "method", "options", "layers"}
    keys |= {"average_tokens", "seeds", "split", "versions", "dtype", "date", "machine"}
    assert all(keys <= row.keys() for row in rows)
    assert {"torch", "transformers", "atp_patch", "code"} <= rows[0]["versions"].keys()
    assert {row["method"] for row in rows} == {
        *("unpruned", "no visual tokens", "fastv", "random", "uniform", "downsample")
    }
    assert {tuple(row["seeds"]) for row in rows if row["method"] == "random"} == {(0, 1), ()}
    low = [row for row in rows if row["budget"] == 0.03]
    unreachable = [row for row in low if row["method"] != "downsample"]
    assert len(unreachable) == 2 * 3
    assert [row["average_tokens"] for row in low if row not in unreachable] == [1, 1]
    assert all("least possible average" in row["unreachable"] for row in unreachable)
    assert all(row["average_tokens"] is None for row in unreachable)


def test_nothing_counts_twice(tmp_path: Path) -> None:
    identity = {"method": "x"}
    run = RunFile.open(tmp_path, "x", identity, {"date": "today"})
    first = {"exist": {3: Answer(1.0, (36, 9)), 5: Answer(0.0, (36, 4))}}
    run.add(0, first)
    run.add(0, {"exist": {3: Answer(0.0, (36, 9))}, "ocr": {3: Answer(0.25, (36, 9))}})
    again = RunFile.open(tmp_path, "x", identity, {"date": "another day"})
    assert again.answers == run.answers == first | {"ocr": {3: Answer(0.25, (36, 9))}}
    assert again.header["date"] == "today"
    assert again.path == run.path


def test_runs_of_another_kind_have_another_file(tmp_path: Path) -> None:
    one = RunFile.open(tmp_path, "x", {"split": "test"}, {})
    other = RunFile.open(tmp_path, "x", {"split": "development"}, {})
    assert one.path != other.path


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = RunFile.open(tmp_path, "x", {}, {})
    run.path.write_text('{"identity":{}}\n{"chunk":0,"tas\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{run.path.name} is damaged .* remove it"):
        RunFile.open(tmp_path, "x", {}, {})
    for damage in (b"\xff\xfe\n", b"1\n", b"[" * 100_000 + b"\n", b'{"a":1}\n{"tasks":1}\n'):
        run.path.write_bytes(damage)
        with pytest.raises(ConfigError, match=rf"{run.path.name} is damaged .* remove it"):
            RunFile.open(tmp_path, "x", {}, {})


def test_a_line_that_was_cut_within_a_letter_is_taken_off(tmp_path: Path) -> None:
    run = RunFile.open(tmp_path, "x", {}, {"model": "M\u00fcller"})
    whole = run.path.read_bytes()
    assert "\u00fc".encode() in whole
    run.path.write_bytes(whole + '{"chunk":0,"\u00fc'.encode()[:-1])
    assert RunFile.open(tmp_path, "x", {}, {}).header["model"] == "M\u00fcller"
    assert run.path.read_bytes() == whole
