"""Reading the summaries of earlier evaluations, for one table and one set of plots of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation.settings import Setting, known_options
from atp_patch.evaluation.statistics import Estimate
from atp_patch.evaluation.summary import Row, Stratum, tokens_in
from atp_patch.tools.files import parse_json

SUMMARY = "summary.jsonl"
_NAN = float("nan")
_IDENTITY = ("model_hash", "processor_hash", "split", "answers", "dtype", "device", "versions")
_FACTS = ("model", "visual_tokens", "machine", "date")


def gather(folders: Sequence[Path], model_hash: str, working: Sequence[int]) -> list[Row]:
    """Read the rows of several summaries, each setting once.

    Differences that are paired by question are kept only where one folder is read, because several
    folders may have been measured against different rivals.

    Args:
        folders: each with the summary that an evaluation wrote.
        model_hash: the hash of the model that all summaries must be of.
        working: the numbers of the model's decoder layers that change anything.

    Raises:
        ConfigError: where a summary is missing or broken, is of another model or of other
            questions, or differs from another one about the same setting.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    asked: dict[str, dict[str, int]] = {}
    for folder in folders:
        for row in _read(folder / SUMMARY, working):
            if row.header["identity"]["model_hash"] != model_hash:
                raise ConfigError(f"{folder} is of another model; give the right --model.")
            if len(folders) > 1:
                row.against = {}
            split = row.header["identity"]["split"]
            counts = asked.setdefault(f"{row.group} {split}", row.questions)
            if row.questions and counts and row.questions != counts:
                raise ConfigError(f"{folder} has other questions than {folders[0]}; leave it out.")
            if len({key.split()[1] for key in asked}) > 1:
                raise ConfigError(f"{folder} is of another split than {folders[0]}; leave it out.")
            key = (row.setting, row.layers, row.group, row.hashes, row.seeds)
            known = rows.setdefault(key, row)
            if known.accuracy != row.accuracy:
                raise ConfigError(
                    f"{folder} says {_mean(row)} of {row.setting.name} before layers {row.layers}, "
                    f"where another says {_mean(known)}; measure them anew."
                )
    order = sorted(rows.values(), key=lambda row: -(row.setting.budget or math.inf))
    return [row for row in order if not row.unreachable] + [r for r in order if r.unreachable]


def _read(file: Path, working: Sequence[int]) -> list[Row]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [_row(parse_json(line), working) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error!r}); give folders that an evaluation wrote."
        ) from error


def _row(data: dict[str, Any], working: Sequence[int]) -> Row:
    layers, seeds = tuple(data["layers"]), tuple(data["seeds"])
    adapter = data["adapter"]
    setting = Setting(
        data["method"],
        known_options(data["method"], data["options"]),
        layers,
        data["budget"],
        data["seed"],
        adapter,
        control=data.get("control"),
        trainings=adapter if len(seeds) > 1 else None,
    )
    hashes = data["adapter_hash"] or ()
    row = Row(setting, data["group"], layers, seeds, unreachable=data["unreachable"])
    row.earlier = {name: value for name, value in data.items() if not name.startswith("minus ")}
    if setting.control is not None:  # a control made today may come from other questions
        row.earlier.setdefault("control_questions", None)
    row.hashes = (hashes,) if isinstance(hashes, str) else tuple(hashes)
    row.header = {
        "identity": {name: data[name] for name in _IDENTITY},
        **{name: data[name] for name in _FACTS},
    }
    if row.unreachable:
        return row
    row.accuracy, row.questions, row.by_seed = (
        data[name] for name in ("accuracy", "questions", "accuracy_by_seed")
    )
    row.by_task = {k: _estimate(v) for k, v in data.get("accuracy_intervals", {}).items()}
    row.mean, row.retention = _estimate(data["mean_accuracy"]), _estimate(data["retention"])
    row.against = {
        name.removeprefix("minus "): _estimate(value)
        for name, value in data.items()
        if name.startswith("minus ")
    }
    row.average_tokens = data["average_tokens"]
    spread = data.get("spread_tokens")
    row.spread_tokens = _NAN if spread is None else spread
    row.tokens = data["tokens_by_task"]
    row.entering = {task: _counts(found) for task, found in data["tokens_entering"].items()}
    row.working_tokens = tokens_in(working, row.entering)
    row.strata = {
        int(kind): Stratum(s["questions"], s["accuracy"], _counts(s["entering"]))
        for kind, s in data["strata"].items()
    }
    return row


def _counts(found: dict[str, float]) -> dict[int, float]:
    return {int(layer): count for layer, count in found.items()}


def _estimate(values: Sequence[float | None]) -> Estimate:
    return Estimate(*(_NAN if value is None else value for value in values))


def _mean(row: Row) -> str:
    return "nothing" if row.mean is None else f"{100 * row.mean.value:.2f} %"
