"""Downsampling, a baseline: the picture itself is shrunk before the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atp_patch.contract import PictureMethod
from atp_patch.maths import shrunk_grid


@dataclass(frozen=True)
class Downsample(PictureMethod):
    """Shrink every picture so that the tower makes about as many tokens as the budget says.

    A grid has whole sides, so the number of tokens is that of the nearest grid with the picture's
    proportions. The fewer tokens are spread over the picture's placeholders as evenly as they are
    over the picture, so that each has about the position of its part of the picture.
    """

    name: ClassVar[str] = "downsample"
    summary: ClassVar[str] = "the picture shrunk before the vision tower (baseline)"

    def grid(
        self, height: int, width: int, count: int, minimum: int, *, square: bool
    ) -> tuple[int, int]:
        """Return the nearest smaller grid of the same proportions."""
        return shrunk_grid(height, width, count, minimum, square=square)
