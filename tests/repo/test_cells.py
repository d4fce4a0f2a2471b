"""The program that tries cells: it finds what is right, what is refused and what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atp_patch.patching.api import is_patched
from tests import cells
from tests.cells import Cell, main, tried

GREEDY = Cell("llava", "layer", "greedy", "sdpa", "left", "dynamic")


@pytest.mark.parametrize("way", cells.WAYS)
def test_every_way_is_right_on_one_family(way: str) -> None:
    single = way in cells.ONE_SAMPLE
    assert tried(replace(GREEDY, way=way, padding="none" if single else "left")) == ("right", "")


@pytest.mark.parametrize("method", cells.METHODS)
def test_every_kind_of_method_is_right_on_one_family(method: str) -> None:
    assert tried(replace(GREEDY, method=method)) == ("right", "")


@pytest.mark.parametrize("way", ["greedy", "several beams", "prompt lookup", "guidance"])
def test_a_choice_that_is_not_carried_out_is_wrong(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that hides one more token than was pruned."""
    kept_of = cells.kept_of

    def fewer(model: Any) -> dict[int, torch.Tensor]:
        kept = kept_of(model)
        first = {layer: rows.clone() for layer, rows in kept.items()}
        for rows in first.values():
            rows[:, rows[0].nonzero()[-2]] = False  # a word of the question
        return first

    monkeypatch.setattr(cells, "kept_of", fewer)
    outcome, why = tried(replace(GREEDY, way=way, padding="none"))
    assert outcome == "wrong"
    assert "differ" in why


def test_a_foreign_error_of_a_call_that_the_host_takes_is_a_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    greedy = cells.WAYS["greedy"]

    def broken(model: Any, *given: Any) -> Any:
        if is_patched(model):
            raise KeyError("something")
        return greedy(model, *given)

    monkeypatch.setitem(cells.WAYS, "greedy", broken)
    assert tried(GREEDY)[0] == "crashed"


def test_refusals_have_their_words() -> None:
    outcome, why = tried(replace(GREEDY, family="gemma3", cache="static"))
    assert outcome == "refused"
    assert "StaticSlidingWindowLayer" in why


def test_a_run_goes_on_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table, picture = (tmp_path / f"cells.{kind}" for kind in ("jsonl", "md", "png"))
    argv = ["run", str(file), "--families", "llava", "--methods", "layer", "--ways", "greedy"]
    assert main(argv) == 0
    assert main([*argv, "turns"]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["way"] for row in rows] == ["greedy", "turns"]
    assert main(["report", str(file), "--table", str(table), "--plot", str(picture)]) == 0
    assert "| greedy | 1 of 1, 0 refused |" in table.read_text()
    assert "right: 2, refused: 0" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
