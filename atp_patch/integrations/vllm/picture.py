"""How the visual tokens of one picture lie."""

from __future__ import annotations

from typing import NamedTuple

from atp_patch.contract import VisualGrid


class Picture(NamedTuple):
    """The visual tokens of one picture, from 0 on.

    Attributes:
        length: how many there are.
        grids: the squares or tiles in which they lie, in order. A token outside them, such as one
            that ends a row, always stays.
    """

    length: int
    grids: tuple[VisualGrid, ...]

    @classmethod
    def tiled(cls, tiles: int, height: int, width: int) -> Picture:
        """A picture of equal tiles that follow one after the other.

        >>> Picture.tiled(2, 3, 4).length
        24
        """
        size = height * width
        grids = (VisualGrid(tile * size, 1, height, width) for tile in range(tiles))
        return cls(tiles * size, tuple(grids))

    @property
    def prunable(self) -> int:
        """How many tokens lie in grids."""
        return sum(grid.length for grid in self.grids)
