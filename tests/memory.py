"""Whether memory stays flat over thousands of generations, some of which are broken off.

python -m tests.memory run memory.jsonl                    # 2,000 generations of each kind
python -m tests.memory report memory.jsonl --docs docs     # the table and the picture

Each kind of method has a process of its own, and so has the plain model. What is measured is the
memory of the process, and the number and the bytes of the tensors that are alive in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import atp_patch
from tests.families.kinds import MIXED, SINGLE, TWO, make
from tests.families.tables import EVERY
from tests.matrix import ROOT, between

START, STOP = "<!-- memory: make memory writes this -->", "<!-- end of memory -->"
FAMILY = next(kind for kind in EVERY if kind.name == "llava_next")
PLAIN = "plain model"
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"method": "fastv", "keep": 0.5, "layers": FAMILY.layers},
    "atp, learned": {
        "method": "atp",
        "keep": 0.5,
        "thresholds": "learned",
        "reference_grid": 6,
        "layers": FAMILY.layers,
    },
    "divprune": {"method": "divprune", "keep": 0.5},
    "prumerge+, then atp": {
        "method": ["prumerge+", "atp"],
        "keep": 0.6,
        "layers": FAMILY.layers,
    },
    "voco": {"method": "voco", "num_tokens": 2},
}
BROKEN_OFF = 10  # one generation in so many ends with an error inside the decoder
EVERY_SO_MANY = 20


class BrokenOffError(Exception):
    """Breaks a generation off."""


def measured(kind: str, generations: int) -> Iterator[dict[str, Any]]:
    """Generate, and measure after every few generations.

    Args:
        kind: the plain model, or a name of ``METHODS``.
        generations: how many there are.
    """
    torch.manual_seed(0)
    drawn = random.Random(kind)
    model = FAMILY.build()
    if kind != PLAIN:
        atp_patch.patch_model(model, **METHODS[kind])
    prompts = [make(FAMILY, samples).inputs for samples in (MIXED, SINGLE, TWO)]
    layers = model.get_decoder().layers
    for number in range(1, generations + 1):
        breaks = drawn.random() < 1 / BROKEN_OFF
        new_tokens = drawn.randint(2, 6)
        if breaks:
            left = [drawn.randint(0, len(layers) * new_tokens - 1)]

            def stop(*_: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise BrokenOffError

            handles = [layer.register_forward_pre_hook(stop) for layer in layers]
        with contextlib.suppress(BrokenOffError):
            model.generate(
                **drawn.choice(prompts),
                max_new_tokens=new_tokens,
                eos_token_id=None,
                do_sample=drawn.random() < 0.5,
                num_beams=drawn.choice((1, 1, 2)),
            )
        if breaks:
            for handle in handles:
                handle.remove()
        if number % EVERY_SO_MANY == 0:
            gc.collect()
            alive = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
            yield {
                "kind": kind,
                "generation": number,
                "resident_bytes": resident_bytes(),
                "tensors": len(alive),
                "tensor_bytes": sum(one.numel() * one.element_size() for one in alive),
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "day": date.today().isoformat(),
            }
            del alive


def resident_bytes() -> int:
    """The memory of this process, as Linux counts it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def run(file: Path, generations: int) -> None:
    """Measure each kind in a process of its own, and write one line for each measurement."""
    with file.open("w", encoding="utf-8") as lines:
        for kind in (PLAIN, *METHODS):
            command = [sys.executable, "-m", "tests.memory", "one", kind, str(generations)]
            subprocess.run(command, stdout=lines, check=True)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one kind's memory did after the first quarter of its generations.

    The growth is the slope between medians of its first and its last third.
    """
    later = rows[len(rows) // 4 :]
    third = len(later) // 3

    def growth(key: str) -> float:
        parts = later[:third], later[-third:]
        first, last = (statistics.median(row[key] for row in part) for part in parts)
        between = [statistics.median(row["generation"] for row in part) for part in parts]
        return (last - first) / (between[1] - between[0])

    return {
        "generations": rows[-1]["generation"],
        "tensors": [f([row["tensors"] for row in later]) for f in (min, max)],
        "tensor_bytes_each": growth("tensor_bytes"),
        "resident_bytes_each": growth("resident_bytes"),
    }


def table(kinds: dict[str, list[dict[str, Any]]]) -> str:
    """The summaries as a table in Markdown."""
    lines = [
        "| model | generations | tensors alive | tensor bytes a generation "
        "| resident bytes a generation |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind, rows in kinds.items():
        found = summary(rows)
        low, high = found["tensors"]
        lines.append(
            f"| {kind} | {found['generations']:,} | {low:,} to {high:,} "
            f"| {found['tensor_bytes_each']:+.1f} | {found['resident_bytes_each']:+,.0f} |"
        )
    return "\n".join(lines)


def plot(kinds: dict[str, list[dict[str, Any]]], path: Path, style: dict[str, Any]) -> None:
    """Draw how resident memory and living tensors changed since the first quarter."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    dashes = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
    with mpl.rc_context(style):
        figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
        for (kind, rows), dash in zip(kinds.items(), dashes, strict=True):
            start = rows[len(rows) // 4]
            at = [row["generation"] for row in rows]
            for axes, key, unit in (
                (above, "resident_bytes", 2**20),
                (below, "tensor_bytes", 2**10),
            ):
                values = [(row[key] - start[key]) / unit for row in rows]
                axes.plot(at, values, label=kind, linestyle=dash)
        above.set_ylabel("resident memory, change in MiB")
        below.set_ylabel("living tensors, change in KiB")
        below.set_xlabel("generations")
        above.legend(fontsize=8, ncols=3, frameon=False)
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)


def report(file: Path, docs: Path) -> None:
    """Write the table into the page of the campaign, and the picture in two versions."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kinds.setdefault(row["kind"], []).append(row)
    between(docs / "campaign.md", START, STOP, table(kinds))
    plot(kinds, docs / "pictures" / "memory.png", {})
    dark = {"figure.facecolor": "#16191f", "axes.facecolor": "#16191f"}
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plot(kinds, docs / "pictures" / "memory-dark.png", dark | dict.fromkeys(inks, "#e8e8e8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(prog="python -m tests.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(dest="part", required=True)
    all_kinds = parts.add_parser("run", help="measure all kinds")
    all_kinds.add_argument("file", type=Path)
    all_kinds.add_argument("--generations", type=int, default=2000)
    one = parts.add_parser("one", help="measure one kind and print its lines")
    one.add_argument("kind", choices=(PLAIN, *METHODS))
    one.add_argument("generations", type=int)
    shown = parts.add_parser("report", help="write the table and the picture")
    shown.add_argument("file", type=Path)
    shown.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    if args.part == "run":
        run(args.file, args.generations)
    elif args.part == "one":
        for row in measured(args.kind, args.generations):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    else:
        report(args.file, args.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
