#!/usr/bin/env python3
"""Measure a table of the field with lmms-eval: every method at every budget on its benchmarks.

    make eval-env
    .venv-eval/bin/python results/large/run.py llava-1.5
    .venv-eval/bin/python results/large/table.py llava-1.5

It needs the network (models and benchmarks come from the Hub) and, for the models of 7 billion
parameters, a GPU with 24 GB; --processes takes several. A run that was broken off goes on where it
was: what has results is left alone, and answers are kept in the harness's own cache. Tasks that are
scored by a language model (mmbench_en_dev, mmvet) need the key that lmms-eval asks for; --tasks
leaves some out.

The table "dry-run" takes the same steps on the built-in model and two kinds of generated questions,
without network, in minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atp_patch import available_methods

HERE = Path(__file__).resolve().parent
PLAIN = "plain"
# Methods that the tables leave out: they need weights of their own for the model.
TRAINED = ("voco",)
DRY_RUN = {
    "pretrained": "builtin",
    "tasks": {"atp_patch_exist": "exact", "atp_patch_count": "exact"},
    "target_tokens": [144],
}


@dataclass(frozen=True)
class Run:
    """One call of the harness.

    Attributes:
        name: the folder of its results.
        method: the method, or "plain".
        budget: the visual tokens, averaged over layers, or their share; None for the plain model.
        arguments: the harness's ``--model_args``.
        tasks: the tasks.
    """

    name: str
    method: str
    budget: float | None
    arguments: str
    tasks: tuple[str, ...]


def table_of(name: str) -> dict[str, Any]:
    """The settings of a table, with its tasks and their metrics."""
    if name == "dry-run":
        return DRY_RUN
    known = yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))
    table = dict(known["tables"][name])
    return {**table, "tasks": known["tasks"][table["tasks"]]}


def runs_of(table: dict[str, Any], methods: list[str], tasks: list[str] | None = None) -> list[Run]:
    """All calls of the harness for a table, the plain model first."""
    asked = tuple(task for task in table["tasks"] if tasks is None or task in tasks)
    common = f"pretrained={table['pretrained']}"
    if "arguments" in table:
        common += f",{table['arguments']}"
    kind = "target_tokens" if "target_tokens" in table else "target_share"
    runs = [Run(PLAIN, PLAIN, None, f"{common},method={PLAIN}", asked)]
    for budget in table[kind]:
        for method in methods:
            name = f"{method.replace('/', '_then_')}-{budget}"
            arguments = f"{common},method={method},{kind}={budget}"
            runs.append(Run(name, method, budget, arguments, asked))
    return runs


def command(run: Run, out: Path, given: argparse.Namespace) -> list[str]:
    """The command line of one call."""
    start = [sys.executable, "-m", "lmms_eval"]
    if given.processes > 1:
        start = [sys.executable, "-m", "accelerate.commands.launch"]
        start += ["--num_processes", str(given.processes), "-m", "lmms_eval"]
    line = [*start, "--model", "atp_patch", "--model_args", run.arguments]
    line += ["--tasks", ",".join(run.tasks), "--batch_size", str(given.batch_size)]
    line += ["--output_path", str(out / run.name), "--use_cache", str(out / "answers")]
    line += ["--log_samples"]
    if given.limit is not None:
        line += ["--limit", str(given.limit)]
    if given.table == "dry-run":
        line += ["--include_path", str(out / "tasks")]
    return line


def finished(folder: Path) -> bool:
    """Whether a call has left its results."""
    return any(folder.rglob("*results.json"))


def main(argv: list[str] | None = None) -> int:
    """Run what is missing of a table."""
    names = list(yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))["tables"])
    every = [name for name in available_methods() if name not in TRAINED]
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("table", choices=[*names, "dry-run"], help="which table")
    parse.add_argument("--methods", default=",".join(every), help="default: %(default)s")
    parse.add_argument("--tasks", help="default: all of the table")
    parse.add_argument("--batch-size", type=int, default=8)
    parse.add_argument("--processes", type=int, default=1, help="one for each GPU (default: 1)")
    parse.add_argument("--limit", type=int, help="questions of a task (default: all)")
    parse.add_argument("--out", type=Path, default=HERE / "out")
    parse.add_argument("--print", action="store_true", help="print the commands, run none")
    given = parse.parse_args(argv)
    out = given.out.resolve() / given.table
    if given.table == "dry-run" and not given.print:
        _write_tasks(out / "tasks", given.limit or 4)
    tasks = None if given.tasks is None else given.tasks.split(",")
    failed = 0
    for run in runs_of(table_of(given.table), given.methods.split(","), tasks):
        line = command(run, out, given)
        if given.print:
            print(shlex.join(line))
        elif finished(out / run.name):
            print(f"{run.name}: done before", flush=True)
        elif subprocess.run(line, check=False).returncode:
            failed += 1
            print(f"{run.name}: failed; the next one goes on", file=sys.stderr, flush=True)
    return 1 if failed else 0


def _write_tasks(folder: Path, questions: int) -> None:
    path = HERE.parents[1] / "examples" / "lmms_eval_tasks.py"
    spec = importlib.util.spec_from_file_location("lmms_eval_tasks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(folder, questions, "development")


if __name__ == "__main__":
    raise SystemExit(main())
