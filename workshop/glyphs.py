"""Draws the glyphs of documents from the free fonts in matplotlib and Pillow.

python -m workshop.glyphs
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atp_patch.builtin.documents.fonts import FIRST, LAST, SIZES_PX

SOURCES = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "mono": "DejaVuSansMono.ttf",
    "aileron": None,  # Pillow's default font
    "serif-italic": "DejaVuSerif-Italic.ttf",
}
TARGET = Path(__file__).parents[1] / "atp_patch/builtin/documents/glyphs.npz"


def main() -> None:
    """Write the file of glyphs."""
    folder = Path(mpl.get_data_path()) / "fonts/ttf"
    tables: dict[str, Any] = {}
    for name, file in SOURCES.items():
        for size in SIZES_PX:
            if file is None:
                face = ImageFont.load_default(size)
            else:
                face = ImageFont.truetype(BytesIO((folder / file).read_bytes()), size)
            assert isinstance(face, ImageFont.FreeTypeFont)  # load_default(size) returns one too
            ascent, descent = face.getmetrics()
            glyphs = []
            for code in range(FIRST, LAST + 1):
                width = max(round(face.getlength(chr(code))), 1)
                glyph = Image.new("L", (width, ascent + descent))
                ImageDraw.Draw(glyph).text((0, 0), chr(code), fill=255, font=face)
                glyphs.append(np.asarray(glyph))
            tables[f"{name}-{size}"] = np.concatenate(glyphs, axis=1)
            widths = [glyph.shape[1] for glyph in glyphs]
            tables[f"{name}-{size}-edges"] = np.cumsum([0, *widths])
    np.savez_compressed(TARGET, **tables)


if __name__ == "__main__":
    main()
