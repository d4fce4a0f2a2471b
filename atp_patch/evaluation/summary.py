"""The numbers that answers give: a row for each setting and group of tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from atp_patch.evaluation.rivals import rivals
from atp_patch.evaluation.settings import UNPRUNED, Setting
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
        questions: how many there are.
        accuracy: their mean score.
        entering: for each layer the mean of the visual tokens that enter it.
    """

    questions: int
    accuracy: float
    entering: dict[int, float]


@dataclass
class Row:
    """What a setting reached on a group of tasks.

    Attributes:
        setting: without its seed or training.
        group: the group of tasks.
        layers: before which decoder layers it prunes.
        seeds: the seeds of the draws, or numbers of the trainings, that are pooled.
        accuracy: for each task the mean score, from 0 to 1.
        by_task: for each task the mean score with its interval.
        questions: for each task how many there are.
        mean: mean of the tasks' accuracies.
        retention: mean over tasks of the accuracy divided by the unpruned model's.
        against: for each rival (:func:`rivals`) the difference of mean accuracy to it.
        average_tokens: visual tokens averaged over all decoder layers and questions, as measured.
        tokens: the same for each task.
        spread_tokens: standard deviation of the visual tokens over the questions, averaged over
            seeds or trainings.
        working_tokens: visual tokens averaged over those decoder layers that change anything.
        entering: for each task and layer the mean of the visual tokens that enter the layer, for
            layer 0 and each pruning layer.
        strata: for each value of ``Task.stratum`` the questions about such pictures.
        by_seed: mean accuracy of each seed or training.
        hashes: the hashes of the adapter of each training.
        unreachable: why the budget cannot be met; nothing else is known then. None where it can.
        header: the header of the run: what was measured, with which versions, where and when.
        earlier: what an earlier summary said of the setting, which is written again as it was.
    """

    setting: Setting
    group: str
    layers: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    accuracy: dict[str, float] = field(default_factory=dict)
    by_task: dict[str, Estimate] = field(default_factory=dict)
    questions: dict[str, int] = field(default_factory=dict)
    mean: Estimate | None = None
    retention: Estimate | None = None
    against: dict[str, Estimate] = field(default_factory=dict)
    average_tokens: float = float("nan")
    spread_tokens: float = float("nan")
    working_tokens: float = float("nan")
    tokens: dict[str, float] = field(default_factory=dict)
    entering: dict[str, dict[int, float]] = field(default_factory=dict)
    strata: dict[int, Stratum] = field(default_factory=dict)
    by_seed: list[float] = field(default_factory=list)
    hashes: tuple[str, ...] = ()
    unreachable: str | None = None
    header: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data, with all that it depends on: model, method, options, seeds
        and versions.
        """
        estimates = {
            "mean_accuracy": self.mean,
            "retention": self.retention,
            **{f"minus {name}": gap for name, gap in self.against.items()},
        }
        return {
            **{k: v for k, v in self.header.items() if k != "identity"},
            **self.header.get("identity", {}),
            **self.setting.identity(),
            "layers": list(self.layers),
            "adapter": self.setting.adapter,
            "adapter_hash": self.hashes[0] if len(self.hashes) == 1 else list(self.hashes) or None,
            "seeds": list(self.seeds),
            "group": self.group,
            "unreachable": self.unreachable,
            "average_tokens": _known(self.average_tokens),
            "spread_tokens": _known(self.spread_tokens),
            "working_tokens": _known(self.working_tokens),
            "questions": self.questions,
            "accuracy": self.accuracy,
            **{name: e.to_list() for name, e in estimates.items() if e is not None},
            "accuracy_by_seed": self.by_seed,
            "accuracy_intervals": {task: e.to_list() for task, e in self.by_task.items()},
            "tokens_by_task": self.tokens,
            "tokens_entering": self.entering,
            "strata": {kind: asdict(stratum) for kind, stratum in self.strata.items()},
            "bootstrap": {"draws": DRAWS, "seed": DRAW_SEED, "unit": "image"},
            **self.earlier,
        }


@dataclass(frozen=True)
class Measured:
    """A setting with what was measured of it.

    Attributes:
        setting: without its seed or training.
        files: one for each seed or training; none where the budget cannot be met.
        seeds: the seeds of the draws, or numbers of the trainings.
        layers: before which decoder layers it prunes.
        unreachable: why the budget cannot be met; None where it can.
        header: the header of the run: what was measured, with which versions, where and when.
        hashes: the hashes of the adapter of each training.
    """

    setting: Setting
    files: tuple[RunFile, ...]
    seeds: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    unreachable: str | None = None
    header: dict[str, Any] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()


def summarize(
    measured: Sequence[Measured],
    tasks: Sequence[Task],
    examples: Sequence[Example],
    num_layers: int,
    split: str,
    draws: int = DRAWS,
    silent: Collection[int] = (),
) -> list[Row]:
    """Make the rows of every group of tasks, with the settings in the given order.

    Args:
        measured: the settings, the unpruned model among them.
        tasks: all tasks of the examples.
        examples: the questions that count; the files may hold more.
        num_layers: how many layers the decoder has.
        split: the split of the examples.
        draws: number of bootstrap draws.
        silent: numbers of decoder layers that change nothing.
    """
    working = [layer for layer in range(num_layers) if layer not in silent]
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
            row = Row(m.setting, group, m.layers, m.seeds, hashes=m.hashes, header=m.header)
            row.unreachable = m.unreachable
            members.append(row)
            if m.unreachable is not None:
                continue
            scores = pooled[m.setting]
            row.accuracy = dict(zip(names, _means(scores), strict=True))
            row.by_task = {
                name: mean_accuracy(scores[:, [k]], weights) for k, name in enumerate(names)
            }
            row.questions = {name: len(numbers) for name, numbers in asked.items()}
            row.mean = mean_accuracy(scores, weights)
            row.retention = retention(scores, plain, weights)
            row.by_seed = [float(np.mean(_means(found))) for found in matrices[m.setting]]
            _count_tokens(row, m, asked, num_layers, working)
            row.strata = _strata(m, kinds)
        unpruned = next(row for row in members if row.setting.name == UNPRUNED)
        for (
            row
        ) in members:  # a run's header has the tokens of one picture; others may differ in size
            row.header = {**row.header, "visual_tokens": unpruned.average_tokens}
            for name, rival in rivals(row, members).items():
                other = pooled[rival.setting]
                row.against[name] = difference(pooled[row.setting], other, weights)
        rows += members
    return rows


def _matrix(file: RunFile, asked: dict[str, list[int]], units: list[int]) -> Array:
    """Return the scores of the questions that count, (units, tasks)."""
    return score_matrix(
        [{n: file.answers[task][n].score for n in numbers} for task, numbers in asked.items()],
        units,
    )


def _means(scores: Array) -> list[float]:
    """Return the mean score of each task."""
    means: list[float] = task_means(scores, np.ones((1, scores.shape[0])))[0].tolist()
    return means


def _count_tokens(
    row: Row,
    measured: Measured,
    asked: dict[str, list[int]],
    num_layers: int,
    working: Sequence[int],
) -> None:
    """Set the row's token counts: means over questions and seeds of what the traces counted."""
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
    row.working_tokens = tokens_in(working, row.entering)


def _known(tokens: float) -> float | None:
    return None if np.isnan(tokens) else tokens


def tokens_in(layers: Sequence[int], entering: dict[str, dict[int, float]]) -> float:
    """Return the visual tokens averaged over some decoder layers and over all tasks, which count
    alike.

    Args:
        layers: numbers of the decoder layers.
        entering: as in :class:`Row`.
    """
    found = [
        counts[max(start for start in counts if start <= layer)]
        for counts in entering.values()
        for layer in layers
    ]
    return float(np.mean(found))


def _strata(measured: Measured, kinds: dict[str, list[tuple[int, int]]]) -> dict[int, Stratum]:
    """Group the answers by the kind of their pictures.

    Args:
        measured: the setting.
        kinds: for each task the numbers of its questions, with the kind of picture of each.
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
