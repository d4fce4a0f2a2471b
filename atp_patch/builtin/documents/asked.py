"""A question about a document, and the parts of the picture that answer it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atp_patch.builtin.documents.canvas import Box
from atp_patch.builtin.scenes import Question


@dataclass(frozen=True)
class DocumentQuestion(Question):
    """A question with its only correct answer and its evidence.

    Attributes:
        evidence: boxes around the parts of the picture that are needed to find and read the answer.
    """

    evidence: tuple[Box, ...] = ()

    def evidence_tokens(
        self, width_px: int, height_px: int, token_px: int
    ) -> frozenset[tuple[int, int]]:
        """Return the (row, column) of each visual token that touches the evidence.

        Args:
            width_px, height_px: size of the picture.
            token_px: side of the square that one visual token shows.
        """
        touched = (box.tokens(token_px, width_px, height_px) for box in self.evidence)
        return frozenset[tuple[int, int]]().union(*touched)


def pick_some(rng: np.random.Generator, items: tuple[str, ...], count: int) -> list[str]:
    """Choose ``count`` different words in random order."""
    return [items[int(number)] for number in rng.permutation(len(items))[:count]]


def inks(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Draw the colours of paper and ink; one in five documents has light ink on dark paper."""
    paper, ink = rng.integers(225, 256, size=3), rng.integers(0, 71, size=3)
    if rng.random() < 0.2:
        paper, ink = 255 - paper, 255 - ink
    (r, g, b), (u, v, w) = paper.tolist(), ink.tolist()
    return (r, g, b), (u, v, w)
