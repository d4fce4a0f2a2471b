"""The command of the evaluation: it loads a model, asks the questions, and writes the results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from atp_patch.builtin import DYNAMIC, NAMES, builtin_path, load_builtin
from atp_patch.builtin.dynamic.tokens import token_ids
from atp_patch.builtin.silent import silent_layers
from atp_patch.builtin.tokens import word_ids
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation import documents  # noqa: F401  (registers its tasks and those of scenes)
from atp_patch.evaluation.gathered import SUMMARY, gather
from atp_patch.evaluation.identity import model_hash, processor_hash, today, versions
from atp_patch.evaluation.options import PROG, check, drop_layers, hub_of, parser
from atp_patch.evaluation.plots import check_plots, draw_all
from atp_patch.evaluation.progress import progress
from atp_patch.evaluation.runner import Bench, chunks, prepared, run
from atp_patch.evaluation.settings import Setting, applied, plan, unreachable
from atp_patch.evaluation.store import RunFile
from atp_patch.evaluation.summary import Measured, Row, summarize
from atp_patch.evaluation.tables import markdown
from atp_patch.evaluation.tasks import Task, choose_tasks
from atp_patch.methods import untrained_methods
from atp_patch.patching.api import require_patch
from atp_patch.patching.plan import default_layers
from atp_patch.tools.arguments import named_values
from atp_patch.tools.command_line import execute, machine, shows_progress
from atp_patch.tools.files import write_text
from atp_patch.tools.loading import choose_device, choose_dtype, load_checkpoint, quiet_transformers

RUNS, TABLE = "runs", "table.md"


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; returns the exit status, as :func:`execute` says."""
    return execute(
        parser(prog),
        _command,
        argv,
        memory="try a smaller --batch-size.",
        stopped="stopped; the same command goes on from here.",
    )


def _command(args: argparse.Namespace) -> None:
    with quiet_transformers(progress=shows_progress(args)):
        check(args)
        if not args.no_plots:
            check_plots()
        rows = evaluate(args) if args.summaries is None else again(args)
        text = write(rows, args)
        if args.json:
            text = json.dumps([row.to_json() for row in rows], indent=1, ensure_ascii=False) + "\n"
        sys.stdout.write(text)


def evaluate(args: argparse.Namespace) -> list[Row]:
    """Measure everything that the arguments ask for; an earlier run is continued where it stopped.

    Raises:
        ATPError: where an argument is wrong.
    """
    tasks = choose_tasks(args.tasks)
    options, hub = named_values(args.option), hub_of(args)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)

    def settings_for(model: Any, silent: Sequence[int] = ()) -> list[Setting]:
        num_layers = model.config.get_text_config().num_hidden_layers
        return plan(
            args.methods or untrained_methods(),
            args.budgets,
            args.seeds,
            options,
            args.layers or default_layers(model),
            args.adapters,
            drop_layers(args.drop_from, num_layers, silent),
            hub,
        )

    model, processor = _load(args.model, device, dtype, settings_for)
    speaks = processor.tokenizer.get_vocab() in (word_ids(), token_ids())
    if args.answers == "forced" and not speaks:
        raise ConfigError(
            f"--answers forced is exact with the built-in tokenizer alone, and {args.model} has "
            "another; give --answers generate."
        )
    answers = {"auto": "forced" if speaks else "generate"}.get(args.answers, args.answers)
    words = [task.name for task in tasks if task.reads]
    if speaks and words:
        raise ConfigError(
            f"--tasks {', '.join(words)}: these need a model that reads ordinary words, and "
            f"{args.model} knows those of the scenes alone; give another --model or other tasks."
        )
    if answers == "forced" and args.max_new_tokens is not None:
        raise ConfigError("--max-new-tokens goes with --answers generate; here they are forced.")
    longest = args.max_new_tokens or max(task.new_tokens for task in tasks)
    sized = NAMES.get(args.model) == DYNAMIC
    bench = Bench(model, processor, speaks, answers, args.batch_size, longest, sized)
    settings = settings_for(model, bench.silent)
    work = chunks(tasks, args.split, args.questions)
    first = next(task for task in tasks if task.name == work[0][0].task)
    visual_tokens = prepared(bench, first, args.split, work[0][0]).visual_tokens
    measured, runs = _open(args, bench, settings, tasks, visual_tokens)
    examples = [example for chunk in work for example in chunk]
    done = sum(file.has(e.task, e.number) for _, file in runs for e in examples)
    with progress(len(runs) * len(examples), done) as advance:
        run(bench, runs, tasks, args.split, work, advance)
    depth = model.config.get_text_config().num_hidden_layers
    return summarize(measured, tasks, examples, depth, args.split, silent=bench.silent)


def again(args: argparse.Namespace) -> list[Row]:
    """Read the rows of earlier evaluations of a model, without asking it anything.

    Raises:
        ConfigError: where they cannot be read or do not go together.
    """
    model, _ = _load(args.model, torch.device("cpu"), torch.float32, lambda model: None)
    depth, silent = model.config.get_text_config().num_hidden_layers, silent_layers(model)
    working = [layer for layer in range(depth) if layer not in silent]
    return gather(args.summaries, model_hash(model), working)


def write(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """Write summary, table and plots to ``args.out``.

    Returns:
        the table as Markdown.

    Raises:
        ConfigError: where the folder cannot be written.
    """
    title = f"Visual tokens and accuracy: {args.model}"
    text = markdown(rows, title)
    lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / SUMMARY, "".join(lines))
        write_text(args.out / TABLE, text)
        if not args.no_plots:
            draw_all(rows, args.out)
    except OSError as error:
        raise ConfigError(f"--out: {error}; give a folder that can be written.") from error
    return text


def _load(name: str, device: torch.device, dtype: torch.dtype, check: Any) -> tuple[Any, Any]:
    if name not in NAMES:
        return load_checkpoint(name, device, dtype, check=check)
    folder = builtin_path(NAMES[name])
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"the built-in model is not in this installation ({folder} is missing); give "
            "--model FOLDER."
        )
    return load_builtin(NAMES[name], dtype=dtype, device=device)


def _open(
    args: argparse.Namespace,
    bench: Bench,
    settings: Sequence[Setting],
    tasks: Sequence[Task],
    visual_tokens: int,
) -> tuple[list[Measured], list[tuple[Setting, RunFile]]]:
    """Open the results files of all settings.

    Returns:
        what is measured, with settings pooled that differ in seed or training alone; and each
        setting that can be measured with its file.
    """
    model = bench.model
    shared = {
        "model_hash": model_hash(model),
        "processor_hash": processor_hash(bench.processor),
        "split": args.split,
        "answers": bench.answers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": versions(),
    }
    if bench.answers == "generate":
        shared["max_new_tokens"] = bench.max_new_tokens
    facts = {
        "model": Path(args.model).name,
        "visual_tokens": visual_tokens,
        "machine": machine(model.device),
        "date": today(),
    }
    reasons = {s: unreachable(model, s, visual_tokens) for s in settings}
    found: list[Measured] = []
    runs: list[tuple[Setting, RunFile]] = []
    for pooled in dict.fromkeys(setting.pooled for setting in settings):
        members = [setting for setting in settings if setting.pooled == pooled]
        why = reasons[members[0]]
        if why is not None:  # the unpruned model was measured before it, and has a header
            header = found[0].header
            found.append(Measured(pooled, (), layers=pooled.layers, unreachable=why, header=header))
            continue
        files = []
        for setting in members:
            identity = shared | {"setting": setting.identity()}
            if setting.control is not None:  # a control is made from questions of all tasks
                identity["control_tasks"] = sorted(task.name for task in tasks)
            name = "-".join(
                str(part)
                for part in (setting.name, setting.budget, setting.seed)
                if part is not None
            )
            files.append(RunFile.open(args.out / RUNS, name, identity, facts))
        runs += zip(members, files, strict=True)
        drawn = range(len(members)) if pooled.trainings else [s.seed for s in members]
        seeds = tuple(seed for seed in drawn if seed is not None)
        layers = _layers_of(model, members, visual_tokens)
        hashes = tuple(s.adapter_hash for s in members if s.adapter_hash is not None)
        begun = {name: files[0].header[name] for name in facts}
        header = {"identity": shared, **begun}
        found.append(Measured(pooled, tuple(files), seeds, layers, header=header, hashes=hashes))
    return found, runs


def _layers_of(model: Any, members: Sequence[Setting], visual_tokens: int) -> tuple[int, ...]:
    """Return the layers before which a setting prunes, which an adapter brings along."""
    if members[0].adapter is None:
        return members[0].layers
    found = set()
    for member in members:
        with applied(model, member, visual_tokens):
            found.add(tuple(require_patch(model).config.layers))
    if len(found) > 1:
        raise ConfigError(
            f"--adapters {members[0].trainings}: its trainings prune before different layers "
            f"({', '.join(map(str, sorted(found)))}); put them into folders of their own."
        )
    return found.pop()
