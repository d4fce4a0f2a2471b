"""From answers to numbers: one row a setting and group of tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from atp_patch.evaluation.settings import BASELINES, UNPRUNED, Setting
from atp_patch.evaluation.statistics import (
    Array,
    Estimate,
    difference,
    draw_weights,
    mean_accuracy,
    retention,
    score_matrix,
    task_means,
)
from atp_patch.evaluation.store import Answer, RunFile
from atp_patch.evaluation.tasks import Example, Task

DRAWS, DRAW_SEED = 2000, 0


@dataclass
class Stratum:
    """Questions about pictures of one kind, over all tasks of a group.

    Attributes:
        accuracy: mean score; ``entering``: as in ``Row``.
    """

    questions: int
    accuracy: float
    entering: dict[int, float]


@dataclass
class Row:
    """What a setting reached on a group of tasks.

    Attributes:
        accuracy: task -> mean score, 0 to 1; ``questions``: task -> how many.
        mean: of the tasks' accuracies; ``retention``: mean of accuracy over unpruned accuracy.
        against: name of a rival, as :func:`_rivals` says -> difference of mean accuracy to it.
        average_tokens: visual tokens averaged over all decoder layers and questions, as measured;
            ``tokens``: by task; ``spread_tokens``: standard deviation over the questions, averaged
            over seeds or trainings.
        entering: task -> layer -> mean visual tokens that enter it, at 0 and each pruning layer.
        strata: what ``Task.stratum`` says of the picture -> the questions about such pictures.
        by_seed: mean accuracy of each seed.
        unreachable: why the budget cannot be met; then nothing else is known.
        run: header of the run, for the record.
    """

    setting: Setting
    group: str
    layers: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    accuracy: dict[str, float] = field(default_factory=dict)
    questions: dict[str, int] = field(default_factory=dict)
    mean: Estimate | None = None
    retention: Estimate | None = None
    against: dict[str, Estimate] = field(default_factory=dict)
    average_tokens: float = float("nan")
    spread_tokens: float = float("nan")
    tokens: dict[str, float] = field(default_factory=dict)
    entering: dict[str, dict[int, float]] = field(default_factory=dict)
    strata: dict[int, Stratum] = field(default_factory=dict)
    by_seed: list[float] = field(default_factory=list)
    unreachable: str | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data; every row names model, method, options, seeds, versions, and so on."""
        estimates = {
            "mean_accuracy": self.mean,
            "retention": self.retention,
            **{f"minus {name}": gap for name, gap in self.against.items()},
        }
        return {
            **{k: v for k, v in self.run.items() if k != "identity"},
            **self.run.get("identity", {}),
            **self.setting.identity(),
            "layers": list(self.layers),
            "adapter": self.setting.adapter,
            "seeds": list(self.seeds),
            "group": self.group,
            "unreachable": self.unreachable,
            "average_tokens": None if self.unreachable else self.average_tokens,
            "spread_tokens": None if self.unreachable else self.spread_tokens,
            "questions": self.questions,
            "accuracy": self.accuracy,
            **{name: e.to_list() for name, e in estimates.items() if e is not None},
            "accuracy_by_seed": self.by_seed,
            "tokens_by_task": self.tokens,
            "tokens_entering": self.entering,
            "strata": {kind: asdict(stratum) for kind, stratum in self.strata.items()},
            "bootstrap": {"draws": DRAWS, "seed": DRAW_SEED, "unit": "image"},
        }


@dataclass(frozen=True)
class Measured:
    """A setting with the files of its seeds, or why it has none."""

    setting: Setting
    files: tuple[RunFile, ...]
    seeds: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    unreachable: str | None = None
    run: dict[str, Any] = field(default_factory=dict)


def summarize(
    measured: Sequence[Measured],
    tasks: Sequence[Task],
    examples: Sequence[Example],
    num_layers: int,
    split: str,
    draws: int = DRAWS,
) -> list[Row]:
    """Rows of every group of tasks, settings in the order given; the unpruned one is among them.

    Args:
        examples: the questions that count; files may hold more.
        num_layers: of the decoder.
        split: of the examples.
    """
    rows: list[Row] = []
    for group in dict.fromkeys(task.group for task in tasks):
        names = [task.name for task in tasks if task.group == group]
        asked = {name: [e.number for e in examples if e.task == name] for name in names}
        units = sorted({number for numbers in asked.values() for number in numbers})
        weights = draw_weights(len(units), draws, DRAW_SEED)
        matrices = {
            m.setting: [_matrix(file, asked, units) for file in m.files]
            for m in measured
            if m.unreachable is None
        }
        pooled: dict[Setting, Array] = {s: np.stack(found).mean(0) for s, found in matrices.items()}
        plain = next(scores for s, scores in pooled.items() if s.name == UNPRUNED)
        kinds = {
            task.name: [(number, task.stratum(split, number)) for number in asked[task.name]]
            for task in tasks
            if task.group == group and task.stratum is not None
        }
        members = []
        for m in measured:
            row = Row(m.setting, group, m.layers, m.seeds, unreachable=m.unreachable, run=m.run)
            members.append(row)
            if m.unreachable is not None:
                continue
            scores = pooled[m.setting]
            row.accuracy = dict(zip(names, _means(scores), strict=True))
            row.questions = {name: len(numbers) for name, numbers in asked.items()}
            row.mean = mean_accuracy(scores, weights)
            row.retention = retention(scores, plain, weights)
            row.by_seed = [float(np.mean(_means(found))) for found in matrices[m.setting]]
            _count_tokens(row, m, asked, num_layers)
            row.strata = _strata(m, kinds)
        for row in members:
            for name, rival in _rivals(row, members).items():
                other = pooled[rival.setting]
                row.against[name] = difference(pooled[row.setting], other, weights)
        rows += members
    return rows


def _matrix(file: RunFile, asked: dict[str, list[int]], units: list[int]) -> Array:
    """(units, tasks) scores of the questions that count."""
    return score_matrix(
        [{n: file.answers[task][n].score for n in numbers} for task, numbers in asked.items()],
        units,
    )


def _means(scores: Array) -> list[float]:
    """The accuracy of each task."""
    means: list[float] = task_means(scores, np.ones((1, scores.shape[0])))[0].tolist()
    return means


def _rivals(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """What a setting is compared with.

    With a budget: the first method and the baselines at the same budget, and before the same layers
    where they were measured so. An adapter: its controls, and the first adapter and methods before
    the same layers that keep as many tokens on average, to a twentieth.
    """
    setting = row.setting
    reached = [other for other in rows if other.unreachable is None]
    if row.unreachable is not None or setting.control is not None:
        return {}
    limited = [other for other in reached if other.setting.budget is not None]
    if setting.adapter is not None:
        controls = {
            f"its {other.setting.control}": other
            for other in reached
            if other.setting.name == f"{setting.name}~{other.setting.control}"
        }
        first = [other for other in reached if other.setting.adapter is not None][:1]
        return controls | {
            other.setting.name: other
            for other in first + limited
            if other is not row
            and other.layers == row.layers
            and abs(other.average_tokens - row.average_tokens) <= 0.05 * row.average_tokens
        }
    if setting.budget is None:
        return {}
    same = [other for other in limited if other.setting.budget == setting.budget]
    chosen = {}
    for name in dict.fromkeys([same[0].setting.name, *BASELINES]):
        named = [other for other in same if other.setting.name == name]
        alike = [other for other in named if other.setting.layers == setting.layers]
        if named and name != setting.name:
            chosen[name] = (alike or named)[0]
    return chosen


def _count_tokens(
    row: Row, measured: Measured, asked: dict[str, list[int]], num_layers: int
) -> None:
    """Means over questions (and seeds) of what the trace counted."""
    starts = [0, *measured.layers]
    spans = np.diff([*starts, num_layers])
    totals: list[Array] = []
    for task, numbers in asked.items():
        found = [[f.answers[task][n].entering for n in numbers] for f in measured.files]
        counts = np.array(found, dtype=np.float64)  # (files, questions, starts)
        averages = counts @ spans / num_layers
        row.tokens[task] = float(averages.mean())
        row.entering[task] = dict(zip(starts, counts.mean((0, 1)).tolist(), strict=True))
        totals.append(averages)
    whole = np.concatenate(totals, axis=1)
    row.average_tokens, row.spread_tokens = float(whole.mean()), float(whole.std(1).mean())


def _strata(measured: Measured, kinds: dict[str, list[tuple[int, int]]]) -> dict[int, Stratum]:
    """Answers told apart by what their pictures show.

    Args:
        kinds: the numbers of each task's questions, with the kind of picture of each.
    """
    found: dict[int, list[Answer]] = defaultdict(list)
    for task, numbered in kinds.items():
        for number, kind in numbered:
            found[kind] += [file.answers[task][number] for file in measured.files]
    strata = {}
    starts = [0, *measured.layers]
    for kind, answers in sorted(found.items()):
        counts = np.array([a.entering for a in answers], dtype=np.float64).mean(0)
        accuracy = float(np.mean([a.score for a in answers]))
        entering = dict(zip(starts, counts.tolist(), strict=True))
        strata[kind] = Stratum(len(answers) // len(measured.files), accuracy, entering)
    return strata
