"""A question about a document, and where in the picture its answer is read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atp_patch.builtin.documents.canvas import Box
from atp_patch.builtin.scenes import Question


@dataclass(frozen=True)
class DocumentQuestion(Question):
    """A question with its only true answer and its evidence.

    Attributes:
        evidence: Boxes that hold what the answer is read from, and what it is found by. Someone who
            sees these parts of the picture, each at its place, can answer.
    """

    evidence: tuple[Box, ...] = ()

    def evidence_tokens(
        self, width_px: int, height_px: int, token_px: int
    ) -> frozenset[tuple[int, int]]:
        """(row, column) of the visual tokens that touch the evidence: the oracle's budget.

        Args:
            width_px, height_px: Size of the picture.
            token_px: Side of what one visual token shows.
        """
        touched = (box.tokens(token_px, width_px, height_px) for box in self.evidence)
        return frozenset[tuple[int, int]]().union(*touched)


def pick(rng: np.random.Generator, items: tuple[str, ...] | list[str]) -> str:
    """One of a few words, each as likely."""
    return items[int(rng.integers(len(items)))]


def pick_some(rng: np.random.Generator, items: tuple[str, ...], count: int) -> list[str]:
    """So many different words, in random order."""
    return [items[int(number)] for number in rng.permutation(len(items))[:count]]


def inks(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Colours of the paper and of what is written on it; one in five documents is dark."""
    paper, ink = rng.integers(225, 256, size=3), rng.integers(0, 71, size=3)
    if rng.random() < 0.2:
        paper, ink = 255 - paper, 255 - ink
    (r, g, b), (u, v, w) = paper.tolist(), ink.tolist()
    return (r, g, b), (u, v, w)
