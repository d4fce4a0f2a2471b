"""What an evaluation measured of an adapter, in the words of a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atp_patch.contract.errors import ConfigError, InputError, first_line
from atp_patch.evaluation.gathered import SUMMARY
from atp_patch.evaluation.identity import adapter_hash
from atp_patch.evaluation.settings import UNPRUNED
from atp_patch.tools.files import parse_json
from atp_patch.tools.trained import find_trained


def results_of(adapter: Path, results: Path) -> str:
    """Write what an evaluation measured of exactly this adapter.

    Args:
        adapter: the folder of the adapter or of its training.
        results: the folder that the evaluation wrote.

    Raises:
        ConfigError: where the folder holds no summary, or nothing of this adapter: it may have been
            trained or calibrated anew since.
    """
    found = find_trained(str(adapter))
    own = adapter_hash(found.adapter, found.lora)
    rows = _rows(results / SUMMARY)
    mine = [row for row in rows if own in _hashes(row) and row.get("control") is None]
    mine = [row for row in mine if row.get("retention")]
    if not mine:
        raise ConfigError(
            f"{results} has no results of the adapter in {adapter} as it is now; measure it with "
            f"atp-patch evaluate --adapters {adapter}, and give its --out."
        )
    return _section(mine, rows)


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [parse_json(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({first_line(error)}); give the --out of an evaluation."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file} is no summary of an evaluation.")
    return rows


def _hashes(row: dict[str, Any]) -> list[str]:
    hashes = row.get("adapter_hash")
    return hashes if isinstance(hashes, list) else [hashes] if isinstance(hashes, str) else []


def _section(mine: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """Write a table of the groups of tasks, and how they were measured."""
    lines = [
        "| questions | visual tokens, mean over layers | accuracy | of the unpruned model's |",
        "|---|---|---|---|",
    ]
    for row in mine:
        plain = [r for r in rows if r["method"] == UNPRUNED and r["group"] == row["group"]]
        total = row["visual_tokens"]
        share = 100 * row["average_tokens"] / total
        tokens = f"{row['average_tokens']:.1f} of {total:g} ({share:.1f} %)"
        unpruned = f"; unpruned {100 * plain[0]['mean_accuracy'][0]:.1f} %" if plain else ""
        lines.append(
            f"| {row['group']}, {sum(row['questions'].values())} | {tokens} | "
            f"{_percent(row['mean_accuracy'])}{unpruned} | {_percent(row['retention'])} |"
        )
    one = mine[0]
    versions = one["versions"]
    trainings = len(_hashes(one))
    pooled = f" Mean over {trainings} trainings, of which this is one." if trainings > 1 else ""
    return "\n".join(
        [
            *lines,
            "",
            f"Measured on {one['date']} with `atp-patch evaluate` on held-out questions (split "
            f"{one['split']}) of {len(one['questions'])} tasks, with the model `{one['model']}` in "
            f"{one['dtype']} on {one['device']}, atp_patch {versions['atp_patch']}, torch "
            f"{versions['torch']}, transformers {versions['transformers']}. In brackets: 95 % "
            "bootstrap intervals over images; the last column is the mean over tasks of accuracy "
            f"relative to the unpruned model's.{pooled}",
        ]
    )


def _percent(estimate: Sequence[float | None]) -> str:
    value, low, high = (None if x is None else 100 * x for x in estimate)
    if value is None:
        return "not known"
    interval = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    return f"{value:.1f}{interval} %"
