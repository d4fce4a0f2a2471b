"""Generated pages, tables, charts, maps and icons, with questions whose evidence is known.

    from atp_patch.builtin.documents import make_document

    document = make_document("page", "test", 0)
    document.image, document.questions[0].text, document.questions[0].answer

The number of visual tokens that a question needs differs widely: a title is read from two tokens,
but the whole page must be seen to know that a word is not on it.
:meth:`DocumentQuestion.evidence_tokens` gives these tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from atp_patch.builtin.documents import charts, icons, maps, pages, tables
from atp_patch.builtin.documents.asked import DocumentQuestion
from atp_patch.builtin.documents.canvas import Box, Canvas
from atp_patch.builtin.documents.fonts import FONTS, SHIFTED_FONTS
from atp_patch.builtin.scenes import scene_rng

SIDES_PX: tuple[int, ...] = tuple(range(192, 449, 32))
"""Widths and heights of documents; both are drawn independently."""

_STREAM = 3000  # stream of random numbers; scenes and their other sizes use other streams


@dataclass(frozen=True)
class Kind:
    """A kind of document.

    Attributes:
        tasks: the tasks of its questions.
        draw: a function of a random generator, width, height and fonts that returns the drawing and
            its contents.
        ask: a function of the contents, a random generator and a task that returns a question, or
            None if none can be asked.
    """

    tasks: tuple[str, ...]
    draw: Callable[[np.random.Generator, int, int, tuple[str, ...]], tuple[Canvas, Any]]
    ask: Callable[[Any, np.random.Generator, str], DocumentQuestion | None]


KINDS: dict[str, Kind] = {
    "page": Kind(pages.TASKS, pages.draw, pages.ask),
    "table": Kind(tables.TASKS, tables.draw, tables.ask),
    "chart": Kind(charts.TASKS, charts.draw, charts.ask),
    "map": Kind(maps.TASKS, maps.draw, maps.ask),
    "icons": Kind(icons.TASKS, icons.draw, icons.ask),
}


@dataclass(frozen=True)
class Document:
    """A picture of a document, and questions about it.

    Attributes:
        kind, split, index: the arguments that it was made from.
        image: the RGB picture, whose width and height are by default from ``SIDES_PX``.
        questions: one question of each task that the document allows.
    """

    kind: str
    split: str
    index: int
    image: Image.Image
    questions: tuple[DocumentQuestion, ...]


def make_document(
    kind: str,
    split: str,
    index: int,
    *,
    size_px: tuple[int, int] | None = None,
    noise: float = 6.0,
    fonts: tuple[str, ...] = FONTS,
) -> Document:
    """Make the document number ``index`` of a kind and split, the same on every machine.

    Args:
        kind: "page", "table", "chart", "map" or "icons".
        split: "train", "development" or "test".
        size_px: (width, height); by default both are drawn from ``SIDES_PX``.
        noise: standard deviation of the pixel noise, 0 to 255.
        fonts: names of the fonts to choose from.

    Raises:
        ValueError: if the kind or the split is unknown, or the index is negative.
    """
    number = _number(kind)
    grain, asking = (scene_rng(split, index, _STREAM + 10 * number + k) for k in (1, 2))
    made = KINDS[kind]
    canvas, said = draw_document(kind, split, index, size_px=size_px, fonts=fonts)
    asked = (made.ask(said, asking, task) for task in made.tasks)
    questions = tuple(question for question in asked if question is not None)
    return Document(kind, split, index, canvas.image(grain, noise), questions)


def draw_document(
    kind: str,
    split: str,
    index: int,
    *,
    size_px: tuple[int, int] | None = None,
    fonts: tuple[str, ...] = FONTS,
) -> tuple[Canvas, Any]:
    """Draw the document of :func:`make_document`, without noise.

    Args:
        kind, split, index, size_px, fonts: as in :func:`make_document`.

    Returns:
        the drawing, and its contents, about which ``KINDS[kind].ask`` asks.

    Raises:
        ValueError: if the kind or the split is unknown, or the index is negative.
    """
    chance = scene_rng(split, index, _STREAM + 10 * _number(kind))
    width, height = (SIDES_PX[int(k)] for k in chance.integers(len(SIDES_PX), size=2))
    if size_px is not None:
        width, height = size_px
    return KINDS[kind].draw(chance, width, height, fonts)


def _number(kind: str) -> int:
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}.")
    return list(KINDS).index(kind)


__all__ = [
    "FONTS",
    "KINDS",
    "SHIFTED_FONTS",
    "SIDES_PX",
    "Box",
    "Document",
    "DocumentQuestion",
    "draw_document",
    "make_document",
]
