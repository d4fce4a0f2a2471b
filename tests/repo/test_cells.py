"""The program that tries cells: it finds what is right, what is refused and what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor

from atp_patch.patching.api import is_patched
from tests import cells, cells_page
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


def test_a_quantized_cache_is_refused() -> None:
    outcome, why = tried(replace(GREEDY, cache="quantized"))
    assert outcome == "refused"
    assert "Quantized" in why


def test_a_run_goes_on_and_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    argv = [str(file), "--families", "llava", "--methods", "layer", "--ways", "greedy"]
    assert main(argv) == 0
    assert main([*argv, "turns"]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # 2 backends x 2 paddings x 3 caches and the quantized one; turns have a dynamic cache.
    assert [row["way"] for row in rows] == ["greedy"] * 13 + ["turns"] * 4
    assert cells_page.main([str(file), "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "cells.md").read_text()
    assert "**17 of 49," in page
    assert "None was wrong, and none crashed" in page
    assert rows[0]["day"] in page
    assert torch.__version__.split("+")[0] in page
    assert all((tmp_path / "pictures" / name).is_file() for name in cells_page.THEMES)


def test_the_page_counts_wrong_cells_and_draws_them(tmp_path: Path) -> None:
    row = {**vars(GREEDY), "why": "", "day": "2026-01-02", "torch": "2", "transformers": "5"}
    rows = [{**row, "outcome": "right"}, {**row, "cache": "static", "outcome": "wrong"}]
    page = cells_page.page(rows)
    assert "1 were wrong or crashed" in page
    assert "| tried | 1 | 1 |" in page
    assert "`fuyu`" in page.split("It has not come to")[1]
    assert "`llava`" not in page.split("It has not come to")[1].splitlines()[0]
    cells_page.plot(rows, tmp_path / "cells.png")
    wrong = cells_page.THEMES["cells.png"][1][cells_page.SHOWN.index("wrong")]
    drawn = Image.open(tmp_path / "cells.png").convert("RGB").getcolors(100_000)
    assert ImageColor.getrgb(wrong) in {colour for _, colour in drawn}


def test_refusals_are_counted_without_the_names_and_numbers_of_one_model() -> None:
    first = "tower needs 12 tokens, which this llava model does not have; take another"
    second = "tower needs 9 tokens, which this fuyu model does not have. Take another."
    assert cells_page.reason(first) == cells_page.reason(second)
    assert cells_page.reason(first) == "tower needs N tokens, which this model does not have"


def test_the_page_says_what_each_method_and_way_is() -> None:
    assert list(cells_page.WHAT_METHODS_ARE) == list(cells.METHODS)
    assert list(cells_page.WHAT_WAYS_ARE) == list(cells.WAYS)
