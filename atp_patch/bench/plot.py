"""The plot of measured speed-ups against the ratio of FLOPs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp_patch.contract.errors import ConfigError
from atp_patch.tools.files import replaced
from atp_patch.visualize.palette import marked

_TITLE_WIDTH = 80  # characters in a line


def check_plot() -> None:
    """Find out before the work whether a plot can be drawn.

    Raises:
        ConfigError: where matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'atp-patch[eval]'.") from error


@contextmanager
def figure(path: Path, title: str) -> Iterator[Any]:
    """Make the axes of a plot. When the block ends, it is written to ``path`` with its legend.

    Args:
        path: the path of the file to write.
        title: the title of the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(6, 5))
    FigureCanvasAgg(made)
    axes = made.add_subplot()
    yield axes
    axes.set_title(textwrap.fill(title, _TITLE_WIDTH), fontsize=9)
    axes.legend(fontsize=8)
    made.tight_layout()
    with replaced(path) as scratch:
        made.savefig(scratch, dpi=120, metadata={"Software": None})


def draw(cases: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the decoder's speed-up against the ratio of FLOPs, with the range over single rounds.

    On the line every FLOP that is saved saves its time.

    Args:
        cases: what :func:`atp_patch.bench.__main__.run` reports.
        title: the title of the plot.
        path: the path of the file to write.
    """
    with figure(path, title) as axes:
        points: dict[str, list[dict[str, Any]]] = {}
        for case in cases:
            for name, column in case["contenders"].items():
                if "against_plain" in column:
                    points.setdefault(name, []).append(column["against_plain"])
        for number, (name, members) in enumerate(points.items()):
            ratio = [p["flops_ratio"] for p in members]
            speed = [p["decoder_speedup"] for p in members]
            # A ratio of medians may lie outside of the ratios of single rounds.
            low = [max(0.0, s - p["pairs"][0]) for s, p in zip(speed, members, strict=True)]
            high = [max(0.0, p["pairs"][1] - s) for s, p in zip(speed, members, strict=True)]
            look = {**marked(number), "linestyle": "none", "capsize": 3}
            axes.errorbar(ratio, speed, yerr=[low, high], label=name, **look)
        top = max(p["flops_ratio"] for members in points.values() for p in members) * 1.1
        axes.plot(
            [1, top], [1, top], color="grey", linewidth=1, label="every FLOP saved is time saved"
        )
        axes.set_xlabel("FLOPs ratio of the decoder's prefill, plain / pruned")
        axes.set_ylabel("decoder speed-up")
