"""Tables of rows in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from atp_patch.evaluation.scenes import SETS
from atp_patch.evaluation.settings import BASELINES, BLIND, DROPPED, UNPRUNED
from atp_patch.evaluation.statistics import Estimate
from atp_patch.evaluation.summary import DRAWS, Row

NOTES = f"""\
- tokens: visual tokens averaged over all decoder layers and questions, as the trace of each forward
  pass counted them; layers before the first pruning count in full. "spread" is their standard
  deviation over questions (and so over sizes of images). The budget is what was asked for, as a
  share of the unpruned count. "working" is their average over those layers alone that change
  anything, where a model has others: what is left to read from.
- Accuracies are percentages. "mean" is over tasks; "retention" is the mean over tasks of accuracy
  relative to the unpruned model's. In brackets: 95 % bootstrap intervals, {DRAWS} draws of images,
  the same draws for every row. "minus NAME": difference of means, paired by question, to the
  method NAME at the same budget (and before the same layers, where it was measured so), in points;
  of methods that decide by themselves: to baselines that keep as many tokens, to a twentieth.
  Of adapters: to the first one and to methods, before the same layers, that keep as many tokens,
  to a twentieth, and to their controls ("its mean", "its shuffled": the same with its thresholds'
  mean, or another question's, at the same average).
- {UNPRUNED}: the plain model. {BLIND}: the plain model without the image; the text keeps the
  position ids that it has behind the image, where the model takes such ids. It shows what can be
  guessed from the question.
- random and uniform are baselines at the same budget; random is the mean over its seeds.
- downsample is the same image made smaller, so that fewer tokens arise."""


def markdown(rows: Sequence[Row], title: str) -> str:
    """Write the page for people: notes, then a table for each group of tasks.

    Args:
        rows: the rows of all groups.
        title: one line that says what was measured.
    """
    origins = dict.fromkeys(map(_origin, rows))
    parts = [f"# {title}", "", "\n".join(origins), "", NOTES]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        about = f": {SETS[group].summary}" if group in SETS else ""
        parts += ["", f"## {group}{about}", "", _questions(members), "", table(members)]
    return "\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Write the table of one group of tasks."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.accuracy))
    rivals = dict.fromkeys(name for row in rows for name in row.against)
    rivals = dict.fromkeys(sorted(rivals, key=BASELINES.__contains__))
    head = ["method", "layers", "budget", "tokens", "spread"]
    silent = any(abs(row.working_tokens - row.average_tokens) > 0.05 for row in rows)
    head += (["working"] if silent else []) + ["mean", "retention"]
    head += [f"minus {name}" for name in rivals] + [task.split("/")[-1] for task in tasks]
    lines = [head, ["---"] * 3 + ["--:"] * (len(head) - 3)]
    for row in rows:
        start = [_method(row), "+".join(map(str, row.layers)) or "-", _budget(row)]
        if row.unreachable is not None:
            lines.append([*start, "unreachable", *["-"] * (len(head) - 4)])
            continue
        lines.append(
            [
                *start,
                _count(row.average_tokens),
                _count(row.spread_tokens),
                *([_count(row.working_tokens)] if silent else []),
                percent(row.mean),
                percent(row.retention),
                *(percent(row.against.get(name), signed=True) for name in rivals),
                *(f"{100 * row.accuracy[task]:.1f}" for task in tasks),
            ]
        )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([text, *_reasons(rows)])


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Return a list of the reasons why budgets cannot be met, with each reason once; or nothing."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.unreachable is not None:
            reasons.setdefault(row.unreachable, []).append(row.setting.name)
    return ["\n".join(f"- {', '.join(n)}: {why}" for why, n in reasons.items())] if reasons else []


def _count(tokens: float) -> str:
    return "-" if math.isnan(tokens) else f"{tokens:.1f}"


def percent(estimate: Estimate | None, signed: bool = False) -> str:
    """Return an estimate in percent, such as ``93.2 [91.0, 94.8]``; "-" where it is undefined."""
    if estimate is None or math.isnan(estimate.value):
        return "-"
    form = "{:+.1f}" if signed else "{:.1f}"
    value, low, high = (form.format(100 * x) for x in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def _method(row: Row) -> str:
    options = ", ".join(f"{name}={value}" for name, value in row.setting.options)
    kind = "seeds" if row.setting.trainings is None else "trainings"
    seeds = f"{len(row.seeds)} {kind}" if len(row.seeds) > 1 else ""
    extra = ", ".join(part for part in (options, seeds) if part)
    return f"{row.setting.name} ({extra})" if extra else row.setting.name


def _budget(row: Row) -> str:
    if row.setting.is_reference or row.setting.name == DROPPED:
        return "-"
    return "its own" if row.setting.budget is None else f"{row.setting.budget:g}"


def _questions(rows: Sequence[Row]) -> str:
    counts = next(row.questions for row in rows if row.questions)
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values()))} questions a task."
    return "Questions: " + ", ".join(f"{task} {n}" for task, n in counts.items()) + "."


def _origin(row: Row) -> str:
    identity = row.header["identity"]
    versions = identity["versions"]
    return (
        f"Model {row.header['model']} ({identity['model_hash']}), split {identity['split']}, "
        f"answers {identity['answers']}, {identity['dtype']} on {row.header['machine']}, "
        f"{row.header['date']}; atp_patch {versions['atp_patch']} (code {versions['code']}), "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )
