"""The repository's results, asked again: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atp_patch.evaluation import command
from atp_patch.evaluation.settings import BASELINES

SUMMARY = Path(__file__).resolve().parents[2] / "results" / "dynamic" / "summary.jsonl"
TASKS = ("count", "ocr")  # which lose most where tokens go
QUESTIONS = 500
ANOTHER_CPU = 3  # questions that other rounding may decide


def rows(text: str) -> dict[tuple[str, float | None], dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    return {(row["method"], row["budget"]): row for row in found if not row["unreachable"]}


@pytest.mark.slow
@pytest.mark.timeout(1500)  # ten minutes and more, where two processes share the cores
def test_the_second_models_results_come_again(tmp_path: Path) -> None:
    argv = ["--model", "builtin-dynamic", "--methods", "atp", "--budgets", "0.25", "--seeds", "3"]
    asked = ["--tasks", ",".join(TASKS), "--questions", str(QUESTIONS), "--no-plots"]
    assert command.main([*argv, *asked, "--out", str(tmp_path)]) == 0
    kept = rows(SUMMARY.read_text(encoding="utf-8"))
    again = rows((tmp_path / "summary.jsonl").read_text(encoding="utf-8"))
    assert {name for name, _ in again} >= {"unpruned", "no visual tokens", "atp", *BASELINES}
    for key, row in again.items():
        assert kept[key]["questions"]["ocr"] == QUESTIONS
        for task in TASKS:
            difference = abs(row["accuracy"][task] - kept[key]["accuracy"][task])
            assert difference * QUESTIONS <= ANOTHER_CPU, (key, task)
            tokens = kept[key]["tokens_by_task"][task]
            assert row["tokens_by_task"][task] == pytest.approx(tokens, rel=1e-3), (key, task)
