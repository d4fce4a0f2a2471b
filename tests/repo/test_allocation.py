"""The upper reference shares tokens out as well as trying everything would."""

from __future__ import annotations

import importlib.util
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ("exist", "count", "ocr")


@pytest.fixture(scope="module")
def allocation() -> Any:
    spec = importlib.util.spec_from_file_location("allocation", ROOT / "results/allocation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(seed: int) -> list[dict[str, Any]]:
    """An unpruned row and four budgets that spend unevenly on the tasks."""
    draw = random.Random(seed)
    plain = {"method": "unpruned", "budget": None, "accuracy": dict.fromkeys(TASKS, 0.9)}
    found = [plain]
    for budget in (0.1, 0.2, 0.3, 0.5):
        tokens = {task: 100 * budget + draw.randint(0, 20) for task in TASKS}
        accuracy = {task: draw.random() for task in TASKS}
        given = {"method": "atp", "budget": budget, "unreachable": None}
        found.append({**given, "tokens_by_task": tokens, "accuracy": accuracy})
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target_tokens", [25, 40])
def test_no_other_choice_is_better(allocation: Any, seed: int, target_tokens: int) -> None:
    plain, *others = rows(seed)
    by_budget = {row["budget"]: row for row in others}
    reached = []
    for budgets in product(by_budget, repeat=len(TASKS)):
        pairs = [(by_budget[b], t) for b, t in zip(budgets, TASKS, strict=True)]
        if sum(row["tokens_by_task"][t] for row, t in pairs) <= target_tokens * len(TASKS):
            reached.append(sum(row["accuracy"][t] / 0.9 for row, t in pairs))
    if not reached:
        with pytest.raises(SystemExit, match="no budget is small enough"):
            allocation.allocate(plain, by_budget, target_tokens)
        return
    chosen = allocation.allocate(plain, by_budget, target_tokens)
    got = sum(by_budget[b]["accuracy"][t] / 0.9 for t, b in chosen.items())
    assert got == pytest.approx(max(reached))


def test_chosen_on_one_file_and_reported_on_the_other(
    allocation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("development", 1), ("test", 2)):
        lines = "".join(json.dumps(row) + "\n" for row in rows(seed))
        (tmp_path / name).write_text(lines)
    files = [str(tmp_path / "development"), str(tmp_path / "test")]
    allocation.main([*files, "--target-tokens", "40"])
    plain, *others = rows(1)
    chosen = allocation.allocate(plain, {row["budget"]: row for row in others}, 40)
    shown = capsys.readouterr().out
    for task, budget in chosen.items():
        row = next(row for row in rows(2) if row["budget"] == budget)
        assert f"| {task} | {budget:g} | {row['tokens_by_task'][task]:.1f} |" in shown
