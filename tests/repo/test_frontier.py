"""The table of every method reads each of them from the right folder."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def frontier() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "results" / "frontier.py"))


def row(method: str, layers: list[int], mean: float, **further: Any) -> dict[str, Any]:
    """One row of a summary, as the evaluation writes them."""
    return {
        "method": method,
        "layers": layers,
        "budget": 0.25,
        "seeds": [],
        "unreachable": None,
        "model": "builtin",
        "split": "test",
        "visual_tokens": 576.0,
        "questions": {"exist": 500},
        "accuracy": {"exist": mean},
        "mean_accuracy": [mean, mean - 0.1, mean + 0.1],
        "retention": [mean, mean - 0.1, mean + 0.1],
        "average_tokens": 144.0,
        "working_tokens": 200.0,
        **further,
    }


def folder(path: Path, *rows: dict[str, Any]) -> str:
    path.mkdir()
    plain = row("unpruned", [], 0.9, budget=None)
    lines = [json.dumps(one) + "\n" for one in (plain, *rows)]
    (path / "summary.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(path)


def test_one_row_for_each_method(
    frontier: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gap = {"minus atp": [-0.1, -0.2, -0.05]}
    first = folder(
        tmp_path / "first",
        row("atp", [1, 4], 0.8),
        row("divprune", [], 0.7, **gap),
        row("late", [1, 4], 0.1, unreachable="too few tokens"),
    )
    later = folder(
        tmp_path / "later",
        row("atp", [1, 4], 0.8),
        row("atp", [2, 4], 0.3),
        row("divprune", [], 0.7),
        row("fastv", [1, 4], 0.75, **gap),
        row("fastv", [2, 4], 0.74, **gap),
        row("prumerge", [], 0.6, **gap),  # was compared with atp before other layers
    )
    file = tmp_path / "choosing.json"
    file.write_text(json.dumps({"divprune": {"0.25": 3.21}}), encoding="utf-8")
    frontier["main"]([first, later, "--choosing", str(file)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(cell[0], cell[1], cell[4], cell[7]) for cell in cells] == [
        ("`atp`", "1, 4", "", ""),
        ("`fastv`", "1, 4", "-10.0 [-20.0, -5.0]", ""),
        ("`divprune`", "-", "-10.0 [-20.0, -5.0]", "3.2"),
        ("`prumerge`", "-", "", ""),
    ]
    assert cells[0][2:] == ["80.0 [70.0, 90.0]"] * 2 + ["", "144.0", "200.0", "", "500"]


def test_folders_that_differ_are_refused(frontier: dict[str, Any], tmp_path: Path) -> None:
    first = folder(tmp_path / "first", row("atp", [1, 4], 0.8))
    later = folder(tmp_path / "later", row("atp", [1, 4], 0.81))
    with pytest.raises(SystemExit, match=r"atp at 0\.25 differs"):
        frontier["main"]([first, later])


@pytest.mark.slow
def test_what_choosing_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods inside, at the door and on the tower, where the budget can be met."""
    choosing = runpy.run_path(str(ROOT / "results" / "choosing.py"))
    file = tmp_path / "choosing.json"
    methods = "atp@4+14+24:0.25+0.06,fastervlm,prumerge+,uniform@1+4"
    given = ["--methods", methods, "--budgets", "0.25", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["choosing.py", *given])
    choosing["main"]()
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {name: list(times) for name, times in found.items()} == {
        name: ["0.25"] for name in ("atp", "fastervlm", "prumerge+", "uniform")
    }
    assert all(times["0.25"] > 0 for times in found.values())
    assert found["uniform"]["0.25"] < found["atp"]["0.25"]
