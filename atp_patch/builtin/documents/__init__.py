"""Generated documents: pages, tables, charts and maps, and questions whose evidence is known.

    from atp_patch.builtin.documents import make_document

    document = make_document("page", "test", 0)
    document.image, document.questions[0].text, document.questions[0].answer

How many visual tokens a question needs differs widely here: a title is read from two tokens, a word
that does not stand on the page is missed only by who has seen all of it.
:meth:`DocumentQuestion.evidence_tokens` says which tokens these are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from atp_patch.builtin.documents import charts, maps, pages, tables
from atp_patch.builtin.documents.asked import DocumentQuestion
from atp_patch.builtin.documents.canvas import Box, Canvas
from atp_patch.builtin.documents.fonts import FONTS, SHIFTED_FONTS
from atp_patch.builtin.scenes import scene_rng

SIDES_PX: tuple[int, ...] = tuple(range(192, 449, 32))
"""Widths and heights of documents; both are drawn independently, so that shapes are odd too."""

_STREAM = 3000  # of chance; scenes and their other sizes have other streams


@dataclass(frozen=True)
class Kind:
    """A kind of document.

    Attributes:
        tasks: What can be asked about it.
        draw: (chance, width, height, fonts) -> the picture in the making, and what it says.
        ask: (what it says, chance, task) -> a question, or None where none can be asked.
    """

    tasks: tuple[str, ...]
    draw: Callable[[np.random.Generator, int, int, tuple[str, ...]], tuple[Canvas, Any]]
    ask: Callable[[Any, np.random.Generator, str], DocumentQuestion | None]


KINDS: dict[str, Kind] = {
    "page": Kind(pages.TASKS, pages.draw, pages.ask),
    "table": Kind(tables.TASKS, tables.draw, tables.ask),
    "chart": Kind(charts.TASKS, charts.draw, charts.ask),
    "map": Kind(maps.TASKS, maps.draw, maps.ask),
}


@dataclass(frozen=True)
class Document:
    """A picture of a document, and questions about it.

    Attributes:
        kind, split, index: What it was made from.
        image: RGB, of any width and height in ``SIDES_PX``.
        questions: One of each task that it allows.
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
    """The document number ``index`` of a kind and split; the same everywhere and always.

    Args:
        kind: "page", "table", "chart" or "map".
        split: "train", "development" or "test".
        size_px: (width, height); by default both are drawn from ``SIDES_PX``.
        noise: Standard deviation of the pixel noise, 0 to 255.
        fonts: What may be written with.

    Raises:
        ValueError: The kind or the split is unknown, or the index is negative.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}.")
    made, number = KINDS[kind], list(KINDS).index(kind)
    chance, grain, asking = (scene_rng(split, index, _STREAM + 10 * number + k) for k in range(3))
    width, height = (SIDES_PX[int(k)] for k in chance.integers(len(SIDES_PX), size=2))
    if size_px is not None:
        width, height = size_px
    canvas, said = made.draw(chance, width, height, fonts)
    asked = (made.ask(said, asking, task) for task in made.tasks)
    questions = tuple(question for question in asked if question is not None)
    return Document(kind, split, index, canvas.image(grain, noise), questions)


__all__ = [
    "FONTS",
    "KINDS",
    "SHIFTED_FONTS",
    "SIDES_PX",
    "Box",
    "Document",
    "DocumentQuestion",
    "make_document",
]
