"""Colours, marks and strokes of lines, which people with any kind of colour vision tell apart."""

from __future__ import annotations

from typing import Any

# Of Okabe and Ito, without the yellow that is lost on white, and with a grey.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#666666")
_MARKS = "os^DvPX*<>hp"
_STROKES = ("solid", "dashed", "dashdot")


def marked(number: int) -> dict[str, Any]:
    """Return the look of a line with marks: no two of the first 84 lines have the same."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": _MARKS[number % len(_MARKS)]}


def stroked(number: int) -> dict[str, Any]:
    """Return the look of a line without marks: no two of the first 21 lines have the same."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": _STROKES[number % len(_STROKES)],
    }
