"""Text as pixels, from stored glyphs, so that a page is the same on every machine.

``glyphs.npz`` holds the printable ASCII characters of a few free fonts at a few sizes, so that a
page depends neither on a font file nor on the version of FreeType. ``FONTS_LICENSE.txt`` says where
the fonts come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FONTS: tuple[str, ...] = ("sans", "sans-bold", "serif", "mono", "aileron")
"""Fonts of every split."""

SHIFTED_FONTS: tuple[str, ...] = ("serif-italic",)
"""Fonts that only shifted test sets use, never training or development."""

SIZES_PX: tuple[int, ...] = (11, 13, 15, 18, 22, 28)
"""Height of the em square."""

FIRST, LAST = 32, 126
"""The first and the last character code."""

_FILE = Path(__file__).with_name("glyphs.npz")


@dataclass(frozen=True)
class Font:
    """The glyphs of one font at one size.

    Attributes:
        strip: (height_px, width_px) uint8, all glyphs side by side; 255 is ink.
        edges: (glyphs + 1,) int64, the column where each glyph begins, and where the last one ends.
    """

    strip: NDArray[np.uint8]
    edges: NDArray[np.int64]

    @property
    def height_px(self) -> int:
        """Height of a line of text, without space between lines."""
        return int(self.strip.shape[0])

    def width_px(self, text: str) -> int:
        """Return the width of a text."""
        return int(sum(self.edges[code + 1] - self.edges[code] for code in _codes(text)))

    def edges_px(self, text: str) -> NDArray[np.int64]:
        """Return where each character of a text begins, and where it ends: (characters + 1,)."""
        widths = [int(self.edges[code + 1] - self.edges[code]) for code in _codes(text)]
        return np.cumsum([0, *widths])

    def ink(self, text: str) -> NDArray[np.uint8]:
        """Return (height_px, width_px) uint8, the pixels of a text; 255 is ink."""
        parts = [self.strip[:, self.edges[code] : self.edges[code + 1]] for code in _codes(text)]
        return np.concatenate(parts, axis=1)


@cache
def font(name: str, size_px: int) -> Font:
    """Load a font at one of its sizes.

    Raises:
        ValueError: if the font or the size is unknown.
    """
    if name not in FONTS + SHIFTED_FONTS or size_px not in SIZES_PX:
        raise ValueError(
            f"there is no font {name!r} of {size_px} px; fonts are "
            f"{', '.join(FONTS + SHIFTED_FONTS)}, sizes {', '.join(map(str, SIZES_PX))}."
        )
    with np.load(_FILE, allow_pickle=False) as glyphs:
        return Font(glyphs[f"{name}-{size_px}"], glyphs[f"{name}-{size_px}-edges"])


def _codes(text: str) -> list[int]:
    codes = [ord(character) - FIRST for character in text]
    if not codes or min(codes) < 0 or max(codes) > LAST - FIRST:
        raise ValueError(f"{text!r} must be printable ASCII, and at least one character.")
    return codes
