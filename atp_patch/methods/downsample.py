"""Downsampling: the picture itself is shrunk before the tower (what any method must beat)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atp_patch.contract import PictureMethod
from atp_patch.maths import shrunk_grid


@dataclass(frozen=True)
class Downsample(PictureMethod):
    """Shrink every picture so that the tower makes about as many tokens as the budget says.

    A grid has whole sides, so the count is that of the nearest grid of the picture's proportions.
    The few tokens stand where their part of the picture stood: positions are spread as evenly over
    the picture's placeholders as the tokens are over the picture.
    """

    name: ClassVar[str] = "downsample"
    summary: ClassVar[str] = "the picture shrunk before the vision tower (baseline)"

    def grid(
        self, height: int, width: int, count: int, least: int, *, square: bool
    ) -> tuple[int, int]:
        """The nearest smaller grid of the same proportions."""
        return shrunk_grid(height, width, count, least, square=square)
