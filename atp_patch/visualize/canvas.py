"""Panels, captions, legends and colour bars on a matplotlib axis, and the drawing they make."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atp_patch.contract.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches and points.
_PANEL, _GAP, _TITLE, _LINE, _LEGEND, _EDGE = 2.4, 0.12, 0.26, 0.2, 0.28, 0.1
_FONT = 9.5
_CHARACTERS = 13  # of the caption, in an inch
_DPI = 140  # 336 pixels for a panel
_SETTINGS: Any = {"svg.hashsalt": "atp_patch", "svg.fonttype": "none"}

Pixels = NDArray[np.uint8]


def require_matplotlib() -> None:
    """Find out whether anything can be drawn.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "atp_patch.visualize draws with matplotlib, which is not installed: "
            "pip install 'atp-patch[visualize]'."
        ) from error


@dataclass(frozen=True)
class Panel:
    """One picture of a drawing.

    Attributes:
        pixels: (height, width, 3), 0 to 255.
        title: the line above it.
        note: the text below it.
    """

    pixels: Pixels
    title: str
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """A finished drawing. As the last value of a notebook's cell it shows itself.

    Attributes:
        figure: the matplotlib figure that holds it.
    """

    figure: Figure

    def png(self, dpi: float = _DPI) -> bytes:
        """Return the figure as a PNG file of so many pixels an inch."""
        return self._file("png", dpi=dpi, metadata={"Software": None})

    def svg(self) -> str:
        """Return the figure as an SVG file whose words are text."""
        return self._file("svg", metadata={"Date": None, "Creator": None}).decode("utf-8")

    def image(self, dpi: float = _DPI) -> Image.Image:
        """Return the figure as a picture of so many pixels an inch."""
        return Image.open(io.BytesIO(self.png(dpi))).convert("RGB")

    def save(self, path: str | Path) -> None:
        """Write a file in the format of its suffix: ``.svg``, or one that Pillow writes."""
        if Path(path).suffix.lower() == ".svg":
            Path(path).write_text(self.svg(), encoding="utf-8")
        else:
            self.image().save(path)

    def _file(self, kind: str, **options: Any) -> bytes:
        from matplotlib import rc_context

        made = io.BytesIO()
        with rc_context(_SETTINGS):
            self.figure.savefig(made, format=kind, facecolor="auto", **options)
        return made.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def plot_axis(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the given axis, or that of a new figure of so many inches."""
    if ax is not None:
        return ax
    require_matplotlib()
    from matplotlib.figure import Figure  # pyplot would keep the figure in a global list

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def drawing_of(ax: Axes) -> Drawing:
    """Return the drawing that holds an axis."""
    figure: Any = ax.figure
    return Drawing(figure.figure)  # a part of a figure knows the whole one


def sheet(
    rows: Sequence[Sequence[Panel]],
    ax: Axes | None = None,
    *,
    caption: Sequence[str] = (),
    legend: Mapping[str, str] | None = None,
    bar: tuple[str, Pixels, str] | None = None,
) -> Drawing:
    """Draw rows of panels, and below them a legend or a colour bar and a caption.

    Args:
        rows: the panels.
        ax: the axis whose place is filled; by default a new figure of the right size.
        caption: lines of text; long ones are broken.
        legend: for each label its colour.
        bar: the words at both ends of a colour bar, and between them its colours, (1, n, 3).

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    require_matplotlib()
    across = max(map(len, rows))
    width = 2 * _EDGE + across * _PANEL + (across - 1) * _GAP
    lines = [
        part
        for line in caption
        for part in textwrap.wrap(line, max(int(width * _CHARACTERS), 24)) or [""]
    ]
    tall = [max(_height(panel) for panel in row) for row in rows]
    foot = _LINE * len(lines) + (_LEGEND if legend or bar else 0)
    height = 2 * _EDGE + sum(tall) + (len(rows) - 1) * _GAP + foot
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, width), ylim=(height, 0))  # from now on in inches from the upper left corner
    top = _EDGE
    for row, high in zip(rows, tall, strict=True):
        for column, panel in enumerate(row):
            _put(ax, panel, _EDGE + column * (_PANEL + _GAP), top, (width, height))
        top += high + _GAP
    top += _EDGE - _GAP
    if legend:
        _put_legend(ax, legend, top)
    if bar:
        _put_bar(ax, bar, top, (width, height))
    top += _LEGEND if legend or bar else 0
    for number, line in enumerate(lines):
        ax.text(_EDGE, top + number * _LINE, line, fontsize=_FONT, va="top", parse_math=False)
    return drawing_of(ax)


def _shape(panel: Panel) -> float:
    return panel.pixels.shape[0] / panel.pixels.shape[1]


def _height(panel: Panel) -> float:
    """Return the height of a panel with its title and note, in inches."""
    notes = len(_note(panel))
    return _TITLE + _PANEL * _shape(panel) + notes * _LINE + (_GAP if notes else 0)


def _note(panel: Panel) -> list[str]:
    return textwrap.wrap(panel.note, int(_PANEL * _CHARACTERS)) if panel.note else []


def _put(ax: Axes, panel: Panel, left: float, top: float, size: tuple[float, float]) -> None:
    """Draw one panel, with its upper left corner so many inches from that of the sheet."""
    width, height = size
    high = _PANEL * _shape(panel)
    below = top + _TITLE + high
    place = left / width, 1 - below / height, _PANEL / width, high / height
    inner = ax.inset_axes(place)
    inner.imshow(panel.pixels, interpolation="nearest", aspect="auto")
    inner.set(xticks=[], yticks=[])
    inner.spines[:].set_color("0.7")
    middle = left + _PANEL / 2
    style: dict[str, Any] = {"ha": "center", "fontsize": _FONT, "parse_math": False}
    ax.text(middle, top + _TITLE / 2, panel.title, va="center", **style)
    for number, line in enumerate(_note(panel)):
        ax.text(middle, below + _GAP / 2 + number * _LINE, line, va="top", **style)


def _put_legend(ax: Axes, legend: Mapping[str, str], top: float) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=label) for label, colour in legend.items()]
    place = (_EDGE, top + _LEGEND / 2)
    ax.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=place,
        bbox_transform=ax.transData,
        ncols=len(handles),
        fontsize=_FONT,
        frameon=False,
        borderaxespad=0,
        borderpad=0,
        handlelength=1,
    )


def _put_bar(ax: Axes, bar: tuple[str, Pixels, str], top: float, size: tuple[float, float]) -> None:
    low, colours, high = bar
    width, height = size
    middle, long, thick = top + _LEGEND / 2, 1.2, 0.1
    start = _EDGE + 0.5
    place = start / width, 1 - (middle + thick / 2) / height, long / width, thick / height
    inner = ax.inset_axes(place)
    inner.imshow(colours, aspect="auto")
    inner.set(xticks=[], yticks=[])
    ax.text(start - 0.06, middle, low, ha="right", va="center", fontsize=_FONT)
    ax.text(start + long + 0.06, middle, high, ha="left", va="center", fontsize=_FONT)
