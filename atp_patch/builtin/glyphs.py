"""Characters drawn by hand on a 5 x 7 raster, so that no font file is needed."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

FONTS: tuple[str, ...] = ("regular", "bold", "slanted")
"""`slanted` is never used in training scenes, only in shifted test sets."""

CELL_WIDTH_PX, CELL_HEIGHT_PX = 16, 24
"""Size of one character's cell: 2 x 3 patches of 8 pixels."""

_ROWS: dict[str, str] = {
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "V": "#...# #...# #...# #...# #...# .#.#. ..#..",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. ..#.. ..#..",
}


@cache
def glyph(character: str, font: str = "regular") -> NDArray[np.bool_]:
    """Return (24, 16) bool, the pixels of a character that are ink.

    Raises:
        ValueError: if the character or the font is unknown.
    """
    if character not in _ROWS:
        raise ValueError(f"no glyph for {character!r}; there are {' '.join(_ROWS)}")
    if font not in FONTS:
        raise ValueError(f"no font {font!r}; there are {', '.join(FONTS)}")
    raster = np.array([[c == "#" for c in row] for row in _ROWS[character].split()])
    ink = np.kron(raster, np.ones((3, 3), dtype=bool))  # (21, 15)
    cell = np.zeros((CELL_HEIGHT_PX, CELL_WIDTH_PX), dtype=bool)
    cell[1:22, :15] = ink
    if font == "bold":
        cell[:, 1:] |= cell[:, :-1]
    elif font == "slanted":
        for row in range(CELL_HEIGHT_PX):
            cell[row] = np.roll(cell[row], (CELL_HEIGHT_PX // 2 - row) // 8)
    cell.setflags(write=False)
    return cell
