"""What ``tests.cells`` has found, as a page of the documentation with a heat map.

python -m tests.cells_page cells.jsonl                 # writes docs/cells.md and its pictures
python -m tests.cells_page cells.jsonl --docs folder
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from tests.cells import KINDS, METHODS, OUTCOMES, SETTINGS, WAYS, cells

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = "not run"
SHOWN = (*OUTCOMES, NOT_RUN)
NAMES = {
    "right": "right",
    "refused": "refused by name",
    "host refuses": "the plain model refuses",
    "not judged": "no reference",
    "wrong": "wrong",
    "crashed": "crashed",
    NOT_RUN: "not run",
}
# From the name of a picture's file to its colours: paper, ink, and one of each outcome.
THEMES = {
    "cells.png": (
        ("#ffffff", "#1a1a1a"),
        ("#0072b2", "#e8b04a", "#c9c9c9", "#8a8a8a", "#c0182b", "#000000", "#f1f1f1"),
    ),
    "cells-dark.png": (
        ("#16191f", "#e8e8e8"),
        ("#56b4e9", "#b98416", "#565b64", "#8f959e", "#ff4d5e", "#ffffff", "#20242b"),
    ),
}
WHAT_METHODS_ARE = {
    "layer": "`fastv` before three decoder layers",
    "layer, learned": "`atp` with learned thresholds",
    "door": "a method that chooses where the pictures enter the decoder",
    "door, then layer": "that method and then `fastv`",
    "tower": "`prumerge+`, which merges the vision tower's tokens",
    "picture": "`downsample`, which makes the grid of tokens smaller",
    "voco": "`voco`, which writes pictures into two tokens",
}
WHAT_WAYS_ARE = {
    "greedy": "the likeliest token at each step",
    "sampling": "two drawn answers to each prompt",
    "beams": "beam search with two beams",
    "several beams": "beam search with two answers to each prompt",
    "prompt lookup": "guesses from the prompt, which the model checks",
    "assistant": "guesses of a second model, which the model checks",
    "streaming": "tokens handed out one at a time",
    "guidance": "classifier-free guidance",
    "embeddings": "`inputs_embeds` in place of pictures",
    "turns": "a second question on the cache of the first answer",
    "copied prefix": "two questions, each on a copy of the prompt's cache",
    "custom loop": "a decoding loop of the caller's own (`custom_generate`)",
}


def reason(message: str) -> str:
    """The first clause of a refusal, without the names and numbers of one model."""
    first = re.split(r"[;.](?: |$)", message, maxsplit=1)[0]
    first = re.sub(r"this \w+ model", "this model", first)
    first = re.sub(r"\b\d+\b", "N", first)
    return first.replace("|", "\\|")


TEMPLATE = Template("""\
# Every way to generate

<!-- make cells writes this page -->

`make cells` runs every model family with every kind of method in every way to generate. Each of
these cells must be right, or be refused with an error that says why.

**$tried of $all cells were tried. $bad.**

$total

They ran $days, with $versions,
on a CPU, with tiny random models of eight decoder layers. The cells are tried in a drawn order, so
that a run that was stopped is a sample of what it was to try.$untried

$picture

## What a cell is

A cell is one of $families models, $methods kinds of method and $ways ways to generate, in each
setting of these: attention `sdpa` or `eager`; a batch with padding on the left, or a single prompt;
a dynamic or a static cache, or none; and a quantized cache with `sdpa` and a batch. Some ways to
generate take a single prompt only, and some a dynamic cache only. Sliding windows belong to the
models that have them.

These are not in the run, and have tests of their own: offloaded caches, which need a GPU; padding
on the right; videos; and each method by its own name. The libraries that quantize a cache are not
installed here, so that the quantized cache is one of the tests' own.

| outcome | meaning |
|---|---|
| right | each step has the reference's logits, or each beam its score, within 0.0001 |
| refused by name | the package raised an error of its own, which says what to do instead |
| the plain model refuses | the same call raises an error without the package too |
| no reference | the plain model's own answer is not that of its pass over the whole sequence |
| wrong | other logits, scores or ids than the reference's |
| crashed | an error that is no refusal, of a call that the plain model takes |

For methods inside the decoder and at its door, the reference is the plain model at full length,
whose later layers cannot see the pruned tokens. For methods that change the tower's tokens, and for
VoCo, it is the patched model's own pass without a cache; other tests compare these methods with
their algorithms written out.

## Outcomes by kind of method

$by_method

## Outcomes by way to generate

$by_way

## Outcomes by setting

$by_attention

$by_padding

$by_cache

## Why cells were refused

$reasons

## Cells without an answer to compare

$unanswered
""")


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page in Markdown.

    Args:
        rows: the lines of the run's file.
    """
    total = Counter(row["outcome"] for row in rows)
    bad = total["wrong"] + total["crashed"]
    light, dark = THEMES
    picture = (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="pictures/{dark}">\n'
        f'  <img src="pictures/{light}" alt="The outcomes of {len(rows):,} cells: models down, '
        'kinds of method and ways to generate across">\n</picture>'
    )
    return TEMPLATE.substitute(
        tried=f"{len(rows):,}",
        all=f"{len(cells()):,}",
        bad=f"{bad:,} were wrong or crashed" if bad else "None was wrong, and none crashed",
        total=_table("cells", Counter(("tried", row["outcome"]) for row in rows), {"tried": ""}),
        untried=_untried(rows),
        days=_days(rows),
        versions=_versions(rows),
        picture=picture,
        families=len(KINDS),
        methods=len(METHODS),
        ways=len(WAYS),
        by_method=counts("kind of method", "method", WHAT_METHODS_ARE, rows),
        by_way=counts("way to generate", "way", WHAT_WAYS_ARE, rows),
        by_attention=counts("attention", "attention", _values(0), rows),
        by_padding=counts("padding", "padding", _values(1), rows),
        by_cache=counts("cache", "cache", _values(2), rows),
        reasons=_reasons(rows),
        unanswered=_unanswered(rows),
    )


def counts(
    title: str, axis: str, values: Mapping[str, str], rows: Iterable[Mapping[str, Any]]
) -> str:
    """A table of outcomes by the values of one axis.

    Args:
        title: of the first column.
        axis: a key of the rows.
        values: each value, and what is said of it.
        rows: the lines of the run's file.
    """
    return _table(title, Counter((row[axis], row["outcome"]) for row in rows), values)


def _table(title: str, found: Mapping[tuple[str, str], int], values: Mapping[str, str]) -> str:
    shown = [name for name in OUTCOMES if any(found[value, name] for value in values)]
    lines = [
        f"| {title} | " + " | ".join(NAMES[name] for name in shown) + " |",
        "|---|" + "--:|" * len(shown),
    ]
    for value, said in values.items():
        name = f"{value}: {said}" if said else value
        lines.append(f"| {name} | " + " | ".join(f"{found[value, one]:,}" for one in shown) + " |")
    return "\n".join(lines)


def _untried(rows: Iterable[Mapping[str, Any]]) -> str:
    tried = {row["family"] for row in rows}
    left = [f"`{name}`" for name in KINDS if name not in tried]
    return f" It has not come to {', '.join(left)}." if left else ""


def _values(place: int) -> dict[str, str]:
    return dict.fromkeys(dict.fromkeys(setting[place] for setting in SETTINGS), "")


def _reasons(rows: Iterable[Mapping[str, Any]]) -> str:
    families: dict[str, set[str]] = defaultdict(set)
    times: Counter[str] = Counter()
    for row in rows:
        if row["outcome"] == "refused":
            why = reason(row["why"])
            times[why] += 1
            families[why].add(row["family"])
    lines = ["| cells | models | the error begins |", "|--:|--:|---|"]
    lines += [f"| {n:,} | {len(families[why])} | {why} |" for why, n in times.most_common()]
    return "\n".join(lines)


def _unanswered(rows: Iterable[Mapping[str, Any]]) -> str:
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["outcome"] in ("host refuses", "not judged"):
            found[row["way"], NAMES[row["outcome"]]][row["family"]] += 1
    lines = ["| way to generate | outcome | models, with their number of cells |", "|---|---|---|"]
    for (way, outcome), families in sorted(found.items()):
        named = ", ".join(f"{name} ({n})" for name, n in sorted(families.items()))
        lines.append(f"| {way} | {outcome} | {named} |")
    return "\n".join(lines)


def _days(rows: Iterable[Mapping[str, Any]]) -> str:
    days = sorted({row["day"] for row in rows})
    return f"on {days[0]}" if len(days) == 1 else f"from {days[0]} to {days[-1]}"


def _versions(rows: Iterable[Mapping[str, Any]]) -> str:
    found = sorted({(row["transformers"], row["torch"].split("+")[0]) for row in rows})
    return " and ".join(f"transformers {host} and torch {torch}" for host, torch in found)


def _shown(outcomes: Counter[str]) -> str:
    for bad in ("crashed", "wrong"):
        if outcomes[bad]:
            return bad
    return max(OUTCOMES, key=lambda outcome: outcomes[outcome])


def plot(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the heat map in the colours of the file's name: models down, methods and ways across.

    Several cells stand at one place. It shows the worst of their outcomes where one is wrong or
    crashed, and else the most frequent.
    """
    (paper, ink), colours = THEMES[path.name]
    families, columns = list(KINDS), [(method, way) for method in METHODS for way in WAYS]
    times: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["family"] in KINDS:
            place = families.index(row["family"]), columns.index((row["method"], row["way"]))
            times[place][row["outcome"]] += 1
    found = np.full((len(families), len(columns)), SHOWN.index(NOT_RUN))
    for place, outcomes in times.items():
        found[place] = SHOWN.index(_shown(outcomes))
    style = {
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
    }
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(15, 0.16 * len(families) + 2.2))
        axes.pcolormesh(
            found,
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(SHOWN) - 0.5,
            edgecolors=paper,
            linewidth=0.6,
        )
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(families)) + 0.5, families, fontsize=7)
        ways = [way for _, way in columns]
        axes.set_xticks(np.arange(len(columns)) + 0.5, ways, rotation=90, fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for number, method in enumerate(METHODS):
            middle = (number + 0.5) * len(WAYS)
            axes.text(middle, -0.5, method, ha="center", va="bottom", fontsize=9)
            if number:
                axes.axvline(number * len(WAYS), color=paper, linewidth=5)
        legend = [
            Patch(color=colours[number], label=NAMES[name])
            for number, name in enumerate(SHOWN)
            if name in ("right", "refused") or (found == number).any()
        ]
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.025), "frameon": False}
        axes.legend(handles=legend, ncols=len(legend), fontsize=9, **above)
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m tests.cells_page", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.file.read_text(encoding="utf-8").splitlines()]
    (args.docs / "pictures").mkdir(exist_ok=True)
    (args.docs / "cells.md").write_text(page(rows), encoding="utf-8")
    for name in THEMES:
        plot(rows, args.docs / "pictures" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
