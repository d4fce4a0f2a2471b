"""The command that says how many visual tokens questions need, and which methods keep them.

python -m atp_patch.evidence
python -m atp_patch.evidence --model FOLDER --methods atp,fastv --budgets 0.25
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from atp_patch.builtin.documents import KINDS
from atp_patch.builtin.dynamic.tokens import token_ids
from atp_patch.builtin.tokens import word_ids
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation import documents  # noqa: F401  (registers its tasks and those of scenes)
from atp_patch.evaluation.evidence import QUANTILES, Need, Recall, needs, recalls, spread
from atp_patch.evaluation.evidence_options import PROG, parser
from atp_patch.evaluation.options import hub_of
from atp_patch.evaluation.runner import Bench
from atp_patch.evaluation.settings import Setting, plan
from atp_patch.evaluation.tasks import Task, choose_tasks
from atp_patch.families import family_of
from atp_patch.methods import untrained_methods
from atp_patch.tools.arguments import named_values
from atp_patch.tools.command_line import execute, progress_bar, shows_progress
from atp_patch.tools.files import write_text
from atp_patch.tools.loading import (
    choose_device,
    choose_dtype,
    load_checkpoint,
    quiet_transformers,
)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; returns the exit status, as :func:`execute` says."""
    return execute(parser(prog), _command, argv, memory="give fewer --questions.")


def _command(args: argparse.Namespace) -> None:
    for name in ("questions", "seeds", "token_px"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {getattr(args, name)} must be at least 1.")
    tasks = choose_tasks(args.tasks or list(KINDS))
    with quiet_transformers(progress=shows_progress(args)):
        with progress_bar("questions", len(tasks) * args.questions) as advance:
            found = needs(tasks, args.split, args.questions, args.token_px, advance)
        text, lines = budget_table(found), [_line(need) for need in found]
        if args.model is not None:
            measured = _measure(args, tasks)
            text += "\n" + recall_table(measured)
            lines += [_line(recall) for recall in measured]
    if args.out is not None:
        try:
            write_text(args.out, "".join(lines))
        except OSError as error:
            raise ConfigError(f"--out: {error}; give a file that can be written.") from error
    if args.json:
        text = json.dumps([json.loads(line) for line in lines], indent=1) + "\n"
    sys.stdout.write(text)


def budget_table(found: Sequence[Need]) -> str:
    """Write the oracle budgets of tasks as a table in Markdown."""
    heads = [f"{quantile:.0%}" for quantile in QUANTILES]
    lines = [
        "Visual tokens that show the evidence, in percent of all: quantiles over questions.",
        "",
        f"| task | questions | {' | '.join(heads)} | {heads[-1]} / {heads[0]} |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for name, shares in spread(found).items():
        number = sum(name in ("all", need.task) for need in found)
        cells = " | ".join(f"{100 * share:.1f}" for share in shares)
        ratio = f"{shares[-1] / shares[0]:.1f}" if shares[0] else "-"
        lines.append(f"| {name} | {number} | {cells} | {ratio} |")
    return "\n".join(lines) + "\n"


def recall_table(found: Sequence[Recall]) -> str:
    """Write mean recalls by setting and layer as a table in Markdown."""
    kinds = list(dict.fromkeys(one.task.partition("/")[0] for one in found))
    lines = [
        "Evidence tokens that enter a layer, in percent of all evidence tokens: means over "
        "questions.",
        "",
        f"| method | budget | layer | tokens | recall | {' | '.join(kinds)} |",
        "|---" * (5 + len(kinds)) + "|",
    ]
    rows: dict[tuple[Setting, int], list[Recall]] = {}
    for one in found:
        rows.setdefault((one.setting.pooled, one.layer), []).append(one)
    for (setting, layer), members in sorted(rows.items(), key=_order):
        each = [[m for m in members if m.task.startswith(f"{kind}/")] for kind in kinds]
        recall = " | ".join(
            f"{100 * _mean(m.recall for m in part):.1f}" for part in (members, *each)
        )
        tokens = 100 * _mean(m.tokens for m in members)
        budget = "-" if setting.budget is None else f"{setting.budget:.0%}"
        lines.append(f"| {setting.name} | {budget} | {layer} | {tokens:.1f} | {recall} |")
    return "\n".join(lines) + "\n"


def _order(row: tuple[tuple[Setting, int], Any]) -> tuple[float, str, int]:
    (setting, layer), _ = row
    return -(setting.budget or 1.0), setting.name, layer


def _mean(values: Any) -> float:
    given = list(values)
    return sum(given) / len(given)


def _line(one: Need | Recall) -> str:
    data: dict[str, Any]
    if isinstance(one, Need):
        data = {"task": one.task, "needed": one.needed, "tokens": one.tokens}
    else:
        data = {
            "task": one.task,
            "setting": one.setting.identity(),
            "layer": one.layer,
            "tokens": one.tokens,
            "recall": one.recall,
        }
    return json.dumps(data) + "\n"


def _measure(args: argparse.Namespace, tasks: Sequence[Task]) -> list[Recall]:
    options, hub = named_values(args.option), hub_of(args)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)

    def settings_for(model: Any) -> list[Setting]:
        layers = model.config.get_text_config().num_hidden_layers
        layers = args.layers or family_of(model.config).default_layers(model.config, layers)
        found = plan(
            args.methods or untrained_methods(),
            args.budgets,
            args.seeds,
            options,
            layers,
            args.adapters,
            hub=hub,
        )
        return [setting for setting in found if not setting.is_reference]

    model, processor = load_checkpoint(args.model, device, dtype, check=settings_for)
    if processor.tokenizer.get_vocab() in (word_ids(), token_ids()):
        raise ConfigError(
            f"--model {args.model} knows the words of scenes alone; give one that reads."
        )
    bench = Bench(model, processor, False, "generate")
    settings = settings_for(model)
    torch.manual_seed(0)
    with progress_bar("passes", len(settings) * len(tasks) * args.questions) as advance:
        return list(recalls(bench, settings, tasks, args.split, args.questions, advance))
