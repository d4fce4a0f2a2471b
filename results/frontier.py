"""One table a budget of every method that was measured, best first, with what choosing takes.

    python results/frontier.py results/every results/builtin \
        --choosing results/every/choosing.json > results/every/frontier.md

Each folder holds a summary of `python -m atp_patch.evaluate`, all of one model and one split. The
questions of one folder may be the first of those of another: each row says how many it answers. A
method that several folders have at a budget is read from the first of them. Later
folders add methods before the layers that the first folder has at that budget, and methods before
the decoder. Differences to `atp` are paired by question. They are left out where a later folder
compared a method with `atp` before other layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FIRST = "atp"
HEAD = (
    *("method", "before layers", "mean accuracy", "of the unpruned", f"minus {FIRST}"),
    *("tokens", "in working layers", "ms to choose", "questions a task"),
)


def read(folder: Path) -> list[Row]:
    """The rows of a folder's summary that were measured."""
    lines = (folder / "summary.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if not row["unreachable"]]


def gathered(folders: list[list[Row]]) -> dict[float, list[Row]]:
    """The rows of each budget, largest budget first, the best row of a budget first.

    Raises:
        SystemExit: where folders differ about a setting that several of them measured.
    """
    chosen: dict[tuple[float, str, tuple[int, ...]], Row] = {}
    budgets = sorted({row["budget"] for row in folders[0] if row["budget"]}, reverse=True)
    layers = {row["budget"]: row["layers"] for row in folders[0] if row["method"] == FIRST}
    for number, rows in enumerate(folders):
        for row in rows:
            budget, name = row["budget"], row["method"]
            if budget not in budgets:
                continue
            if number and row["layers"] not in ([], layers.get(budget)):
                continue
            key = (budget, name, tuple(row["layers"]))
            known = chosen.setdefault(key, row)
            alike = known["questions"] == row["questions"] and known["seeds"] == row["seeds"]
            if alike and known["accuracy"] != row["accuracy"]:
                raise SystemExit(f"{name} at {budget:g} differs between folders; measure it anew.")
            if number and known is row and not row["layers"]:
                row.pop(f"minus {FIRST}", None)
    found: dict[float, list[Row]] = {budget: [] for budget in budgets}
    for (budget, _, _), row in chosen.items():
        found[budget].append(row)
    for rows in found.values():
        rows.sort(key=lambda row: -row["mean_accuracy"][0])
    return found


def percent(estimate: list[float] | None, sign: str = "") -> str:
    """A number with its interval, in percent."""
    if estimate is None:
        return ""
    value, low, high = (f"{100 * x:{sign}.1f}" for x in estimate)
    return f"{value} [{low}, {high}]"


def table(rows: list[Row], budget: float, choosing: dict[str, dict[str, float]]) -> str:
    """The table of one budget as Markdown."""
    lines = [HEAD, ("---",) * 2 + ("--:",) * (len(HEAD) - 2)]
    timed = HEAD.index("ms to choose")
    for row in rows:
        name, took = row["method"], choosing.get(row["method"], {}).get(f"{budget:g}")
        lines.append(
            (
                f"`{name}`",
                ", ".join(map(str, row["layers"])) or "-",
                percent(row["mean_accuracy"]),
                percent(row["retention"]),
                percent(row.get(f"minus {FIRST}"), "+"),
                f"{row['average_tokens']:.1f}",
                f"{row['working_tokens']:.1f}",
                "" if took is None else f"{took:.1f}",
                str(max(row["questions"].values())),
            )
        )
    if not choosing:
        lines = [(*cells[:timed], *cells[timed + 1 :]) for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--choosing", type=Path, help="what results/choosing.py wrote")
    given = parser.parse_args(arguments)
    folders = [read(folder) for folder in given.folders]
    choosing = {} if given.choosing is None else json.loads(given.choosing.read_text())
    plain = next(row for row in folders[0] if row["method"] == "unpruned")
    print(f"# Every method: {plain['model']}\n")
    print(
        f"Split {plain['split']}, {len(plain['questions'])} tasks. The unpruned model answers "
        f"{percent(plain['mean_accuracy'])} % of them and has {plain['visual_tokens']:.0f} visual "
        "tokens. Brackets: 95 % bootstrap intervals over images; differences are paired by "
        "question. *Tokens*: mean over all decoder layers. *In working layers*: mean over the "
        "layers that change anything."
        + (" *ms to choose*: CPU time of one core for one picture." if choosing else "")
    )
    for budget, rows in gathered(folders).items():
        print(f"\n## {100 * budget:g} %\n\n{table(rows, budget, choosing)}")


if __name__ == "__main__":
    main()
