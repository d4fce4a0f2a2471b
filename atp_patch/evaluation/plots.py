"""Plots of accuracy against visual tokens, over all tasks and by task, and of the tokens kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation.settings import BLIND, DROPPED, UNPRUNED
from atp_patch.evaluation.statistics import Estimate
from atp_patch.evaluation.summary import Row
from atp_patch.tools.files import replaced
from atp_patch.visualize.palette import marked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_COLUMNS = 4


def check_plots() -> None:
    """Find out before the work whether plots can be drawn.

    Raises:
        ConfigError: where matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: pip install 'atp-patch[eval]', or give --no-plots."
        ) from error


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the plots of each group of tasks to a folder, and return their paths."""
    written = []
    for group in dict.fromkeys(row.group for row in rows):
        members = [r for r in rows if r.group == group and r.unreachable is None]
        for name, figure in (
            ("frontier", frontier(members)),
            ("tasks", frontier_by_task(members)),
            ("kept", kept_by_layer(members)),
            ("objects", kept_by_stratum(members)),
            ("depth", by_depth(members)),
        ):
            if figure is not None:
                written.append(folder / f"{group}-{name}.png")
                with replaced(written[-1]) as scratch:
                    figure.savefig(scratch, dpi=120, metadata={"Software": None})
    return written


def frontier(rows: Sequence[Row]) -> Any:
    """Draw mean accuracy against average visual tokens, with 95 % intervals."""
    figure, ((axes,),) = _figure(1, 1, (9, 5))
    for number, (label, points) in enumerate(_curves(rows).items()):
        estimates = [row.mean for row in points if row.mean is not None]
        tokens = [row.average_tokens for row in points]
        _with_intervals(axes, tokens, estimates, label, number, capsize=3)
    _references(axes, rows, lambda row: row.mean.value if row.mean else math.nan)
    axes.set_ylabel("accuracy, mean over tasks")
    _legend_beside(figure, axes)
    return figure


def frontier_by_task(rows: Sequence[Row]) -> Any:
    """Draw each task's accuracy against average visual tokens, in a panel of its own."""
    tasks = list(rows[0].accuracy)
    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        for number, (label, points) in enumerate(_curves(rows).items()):
            alone = Estimate(math.nan, math.nan, math.nan)
            estimates = [
                replace(row.by_task.get(task, alone), value=row.accuracy[task]) for row in points
            ]
            _with_intervals(
                axes, [row.tokens[task] for row in points], estimates, label, number, ms=4
            )
        _references(axes, rows, lambda row, task=task: row.accuracy[task])
        axes.set_title(task, fontsize=9)
    _legend_beside(figure, panels[0])
    return figure


def _with_intervals(
    axes: Axes,
    tokens: Sequence[float],
    estimates: Sequence[Estimate],
    label: str,
    number: int,
    **look: Any,
) -> None:
    """Draw one line, with an interval at each point where one is known."""
    values = [e.value for e in estimates]
    # With few images a rounding error may put the value itself outside of its interval.
    low = [max(0.0, e.value - _or(e.low, e.value)) for e in estimates]
    high = [max(0.0, _or(e.high, e.value) - e.value) for e in estimates]
    axes.errorbar(tokens, values, yerr=[low, high], label=label, **marked(number), lw=1, **look)


def by_depth(rows: Sequence[Row]) -> Any:
    """Draw each task's accuracy where all visual tokens are left out from a decoder layer on,
    against that layer. The unpruned model stands behind the last layer.

    Returns:
        the figure; None where nothing of the kind was measured.
    """
    points = {row.layers[0]: row for row in rows if row.setting.name == DROPPED}
    if not points:
        return None
    ends = {BLIND: 0, UNPRUNED: max(points) + 1}
    points |= {ends[row.setting.name]: row for row in rows if row.setting.name in ends}
    layers = sorted(points)
    steps: dict[str, Any] = {
        "drawstyle": "steps-post"
    }  # the count stays the same between two layers
    figure, ((axes,),) = _figure(1, 1, (8, 5))
    for number, task in enumerate(rows[0].accuracy):
        values = [points[layer].accuracy[task] for layer in layers]
        axes.plot(layers, values, label=task, **marked(number), ms=4, lw=1, **steps)
    means = [points[layer].mean for layer in layers]
    axes.plot(layers, [m.value for m in means if m], color="black", lw=2.5, label="mean", **steps)
    axes.set_xlabel("no visual tokens from this decoder layer on")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def kept_by_layer(rows: Sequence[Row]) -> Any:
    """Draw how many visual tokens enter each pruning layer: a panel for each setting, a line in it
    for each task. Where some settings keep more for one task than for another, all others are left
    out.

    Returns:
        the figure; None where no setting can be drawn so.
    """
    pruned = [row for row in rows if row.layers and row.setting.name != DROPPED]
    if not pruned:
        return None
    pruned = [row for row in pruned if _tells_apart(row)] or pruned
    figure, panels = _panels(len(pruned), common_y=True)
    for axes, row in zip(panels, pruned, strict=True):
        for number, (task, counts) in enumerate(row.entering.items()):
            layers, means = list(counts), list(counts.values())
            axes.plot(layers, means, label=task, **marked(number), ms=4, lw=1)
        axes.set_title(_title(row), fontsize=9)
        axes.set_xticks([0, *row.layers])
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.set_xlabel("decoder layer", fontsize=8)
    panels[0].set_ylabel("visual tokens", fontsize=8)
    _legend_beside(figure, panels[0])
    return figure


def kept_by_stratum(rows: Sequence[Row]) -> Any:
    """Draw how many visual tokens enter the decoder and each pruning layer, against the number of
    objects in the picture. Each setting that decides itself how many to keep has a panel.

    Returns:
        the figure; None where there is no such setting.
    """
    given = {UNPRUNED, BLIND, DROPPED}
    adaptive = [r for r in rows if r.setting.budget is None and r.setting.name not in given]
    if not adaptive:
        return None
    figure, panels = _panels(len(adaptive), common_y=True)
    for axes, row in zip(panels, adaptive, strict=True):
        for number, layer in enumerate(next(iter(row.strata.values())).entering):
            means = [stratum.entering[layer] for stratum in row.strata.values()]
            label = f"enter layer {layer}"
            axes.plot(list(row.strata), means, label=label, **marked(number), ms=3, lw=1)
        axes.set_title(_title(row), fontsize=9)
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.set_xlabel("objects in the picture", fontsize=8)
    panels[0].set_ylabel("visual tokens", fontsize=8)
    _legend_beside(figure, panels[0])
    return figure


def _tells_apart(row: Row) -> bool:
    """Return whether the tokens that enter some layer differ between tasks by more than a
    twentieth.
    """
    by_layer: dict[int, list[float]] = {}
    for counts in row.entering.values():
        for layer, mean in counts.items():
            by_layer.setdefault(layer, []).append(mean)
    return any(max(means) > 1.05 * min(means) for means in by_layer.values())


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each method and its layers, sorted by their average tokens."""
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.average_tokens):
        if not row.setting.is_reference and row.setting.name != DROPPED:
            layers = f" @ {'+'.join(map(str, row.layers))}" if row.layers else ""
            label = row.setting.name + layers
            curves.setdefault(label, []).append(row)
    return curves


def _references(axes: Axes, rows: Sequence[Row], value: Any) -> None:
    for name, style in ((UNPRUNED, "-"), (BLIND, ":")):
        for row in (row for row in rows if row.setting.name == name):
            axes.axhline(value(row), color="0.5", ls=style, lw=1, label=name)
    low, high = axes.get_xlim()
    if high > 3 * low:  # a shorter logarithmic axis has no round numbers to show
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    axes.set_xlabel("visual tokens, mean over layers", fontsize=8)
    axes.grid(alpha=0.3)


def _plain_numbers(axis: Axis) -> None:
    """Write 40 and not 4 x 10^1 along a logarithmic axis."""
    from matplotlib.ticker import LogFormatter

    for show in (axis.set_major_formatter, axis.set_minor_formatter):
        show(LogFormatter(minor_thresholds=(2, 0.5)))


def _figure(
    height: int, columns: int, inches: tuple[float, float], common_y: bool = False
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # pyplot would need a display and keep global state

    figure = Figure(figsize=inches, layout="constrained")
    return figure, figure.subplots(height, columns, squeeze=False, sharey=common_y)


def _panels(count: int, common_y: bool = False) -> tuple[Any, list[Axes]]:
    """Make a figure with ``count`` panels; the other places of its grid are left empty."""
    columns = min(_COLUMNS, count)
    height = math.ceil(count / columns)
    inches = (3.2 * columns + 1.2, 2.6 * height)
    figure, grid = _figure(height, columns, inches, common_y)
    panels = [axes for line in grid for axes in line]
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _legend_beside(figure: Any, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _title(row: Row) -> str:
    budget = "" if row.setting.budget is None else f" {row.setting.budget:g}"
    return f"{row.setting.name}{budget}"


def _or(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value
