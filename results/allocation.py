"""How far a better share of the same tokens between tasks could go: an upper reference.

    python results/allocation.py results/allocation-development/summary.jsonl \
        results/allocation/summary.jsonl --method atp --target-tokens 144

Both files are of `python -m atp_patch.evaluate`, with one method at many budgets: the first of
development questions, from which each task's budget is chosen, the second of test questions, on
which the choice is reported. The choice is the best there is (dynamic programming), and it knows
which task a question belongs to, which no method is told.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path, method: str) -> tuple[Row, dict[float, Row]]:
    """The unpruned row, and the method's rows by budget."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    plain = next(row for row in rows if row["method"] == "unpruned")
    found = {row["budget"]: row for row in rows if row["method"] == method and row["budget"]}
    return plain, {budget: row for budget, row in found.items() if not row["unreachable"]}


def allocate(plain: Row, rows: dict[float, Row], target_tokens: float) -> dict[str, float]:
    """The budget of each task for which mean retention is greatest, the mean of the tokens being
    ``target_tokens`` at most.

    Raises:
        SystemExit: where even the smallest budgets need more.
    """
    tasks = list(plain["accuracy"])
    room = math.floor(len(tasks) * target_tokens)
    # Tokens spent so far -> the best gain, and the budgets that reach it.
    best: dict[int, tuple[float, tuple[float, ...]]] = {0: (0.0, ())}
    for task in tasks:
        following: dict[int, tuple[float, tuple[float, ...]]] = {}
        for spent, (gain, chosen) in best.items():
            for budget, row in rows.items():
                after = spent + math.ceil(row["tokens_by_task"][task])
                reached = gain + row["accuracy"][task] / plain["accuracy"][task]
                if after <= room and reached > following.get(after, (-1.0,))[0]:
                    following[after] = reached, (*chosen, budget)
        best = following
    if not best:
        raise SystemExit(f"no budget is small enough for {target_tokens:g} tokens.")
    chosen = max(best.values())[1]
    return dict(zip(tasks, chosen, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Choose on the first file, report on the second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("development", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--method", default="atp")
    parser.add_argument("--target-tokens", type=float, required=True)
    asked = parser.parse_args(arguments)
    budgets = allocate(*read(asked.development, asked.method), asked.target_tokens)
    plain, rows = read(asked.test, asked.method)
    picked = {task: rows[budget] for task, budget in budgets.items()}
    shares = {t: row["accuracy"][t] / plain["accuracy"][t] for t, row in picked.items()}
    tokens = {task: row["tokens_by_task"][task] for task, row in picked.items()}
    print("| task | budget | tokens | accuracy | of unpruned |\n|---|--:|--:|--:|--:|")
    for task, row in picked.items():
        accuracy = 100 * row["accuracy"][task]
        cells = (
            f"{budgets[task]:g} | {tokens[task]:.1f} | {accuracy:.1f} | {100 * shares[task]:.1f}"
        )
        print(f"| {task} | {cells} |")
    mean = sum(row["accuracy"][t] for t, row in picked.items()) / len(picked)
    print(
        f"| mean | | {sum(tokens.values()) / len(tokens):.1f} | {100 * mean:.1f} | "
        f"{100 * sum(shares.values()) / len(shares):.1f} |"
    )


if __name__ == "__main__":
    main()
