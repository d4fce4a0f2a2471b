#!/usr/bin/env python3
"""Turn what run.py left into a table: each method's scores, what is kept of the plain model's, and
what the methods' papers report.

    python results/large/table.py llava-1.5 > llava-1.5.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from run import HERE, PLAIN, TRAINED, Run, runs_of, table_of

from atp_patch import available_methods


def scores(folder: Path, metrics: dict[str, str]) -> dict[str, float]:
    """The score of each task that has results in a folder.

    lmms-eval gives some groups of tasks, such as MVBench, no score of their own: theirs is the mean
    of their tasks.

    Raises:
        SystemExit: where a task has results without the table's metric.
    """
    found: dict[str, float] = {}
    for file in sorted(folder.rglob("*results.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        results, groups = content["results"], content.get("group_subtasks", {})
        for task, metric in metrics.items():
            if task not in results:
                continue
            values = _values(results, [task], metric) or _values(results, groups.get(task), metric)
            if not values:
                raise SystemExit(f"{file} has no metric {metric} of {task}; see tables.yaml.")
            found[task] = sum(values) / len(values)
    return found


def _values(results: dict[str, Any], tasks: list[str] | None, metric: str) -> list[float]:
    """What tasks scored by a metric; the harness appends the name of a filter to the metric's."""
    rows = [item for task in tasks or [] for item in results[task].items()]
    return [float(value) for key, value in rows if key.split(",")[0] == metric]


def kept(folder: Path) -> float | None:
    """The visual tokens averaged over layers that were measured, or None."""
    for file in folder.rglob("*results.json"):
        throughput = json.loads(file.read_text(encoding="utf-8")).get("throughput", {})
        if "avg_visual_tokens_over_layers" in throughput:
            return float(throughput["avg_visual_tokens_over_layers"])
    return None


def table(name: str, out: Path, methods: list[str]) -> str:
    """The table in Markdown. Runs without results are left out."""
    settings = table_of(name)
    metrics: dict[str, str] = settings["tasks"]
    papers = _papers(name)
    plain = scores(out / name / PLAIN, metrics)
    tasks = [task for task in metrics if task in plain]
    head = ["method", "budget", "tokens measured", *tasks, "kept, %", "paper, %"]
    lines = [_row(head), _row(["---", *["--:"] * (len(head) - 1)])]
    for run in runs_of(settings, methods):
        here = scores(out / name / run.name, metrics)
        if here:
            lines.append(_row(_cells(run, here, plain, tasks, kept(out / name / run.name), papers)))
    return "\n".join(lines) + "\n"


def _cells(
    run: Run,
    here: dict[str, float],
    plain: dict[str, float],
    tasks: list[str],
    tokens: float | None,
    papers: dict[str, dict[float, float]],
) -> list[str]:
    shares = [here[task] / plain[task] for task in tasks if task in here and plain[task]]
    whole = len(shares) == len(tasks) and shares
    theirs = papers.get(run.method, {}).get(run.budget or 0)
    return [
        run.method,
        "-" if run.budget is None else f"{run.budget:g}",
        "-" if tokens is None else f"{tokens:.1f}",
        *[f"{here[task]:.4g}" if task in here else "-" for task in tasks],
        f"{100 * sum(shares) / len(shares):.1f}" if whole else "-",
        "-" if theirs is None else f"{theirs:.1f}",
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _papers(name: str) -> dict[str, dict[float, float]]:
    known: dict[str, Any] = yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))
    return known["papers"].get(name, {})


def main(argv: list[str] | None = None) -> None:
    """Print a table."""
    every = [name for name in available_methods() if name not in TRAINED]
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parse.add_argument("table")
    parse.add_argument("--methods", default=",".join(every))
    parse.add_argument("--out", type=Path, default=HERE / "out")
    given = parse.parse_args(argv)
    print(table(given.table, given.out, given.methods.split(",")), end="")


if __name__ == "__main__":
    main()
