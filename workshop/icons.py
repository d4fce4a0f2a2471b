"""Draws the icons of documents from the font Noto Color Emoji, which has pictures of 136 x 128.

python -m workshop.icons NotoColorEmoji.ttf
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atp_patch.builtin.documents.icons import SIZES_PX

EMOJI = {
    "apple": "\U0001f34e",
    "ball": "\u26bd",
    "banana": "\U0001f34c",
    "bee": "\U0001f41d",
    "bell": "\U0001f514",
    "bicycle": "\U0001f6b2",
    "bird": "\U0001f426",
    "book": "\U0001f4d5",
    "bus": "\U0001f68c",
    "cactus": "\U0001f335",
    "car": "\U0001f697",
    "carrot": "\U0001f955",
    "cat": "\U0001f431",
    "clock": "\u23f0",
    "crown": "\U0001f451",
    "dog": "\U0001f436",
    "drum": "\U0001f941",
    "fish": "\U0001f41f",
    "flower": "\U0001f33b",
    "frog": "\U0001f438",
    "guitar": "\U0001f3b8",
    "hat": "\U0001f3a9",
    "house": "\U0001f3e0",
    "key": "\U0001f511",
    "lamp": "\U0001f4a1",
    "lemon": "\U0001f34b",
    "moon": "\U0001f319",
    "mushroom": "\U0001f344",
    "pig": "\U0001f437",
    "pizza": "\U0001f355",
    "rocket": "\U0001f680",
    "shoe": "\U0001f45f",
    "snail": "\U0001f40c",
    "star": "\u2b50",
    "tree": "\U0001f333",
    "turtle": "\U0001f422",
}
_STRIKE_PX = 109
"""The only size of the font."""
TARGET = Path(__file__).parents[1] / "atp_patch/builtin/documents/icons.npz"


def main(font: str) -> None:
    """Write the file of icons."""
    face = ImageFont.truetype(font, _STRIKE_PX)
    tables: dict[str, Any] = {}
    for size in SIZES_PX:
        drawn = []
        for character in EMOJI.values():
            large = Image.new("RGBA", (136, 136))
            ImageDraw.Draw(large).text((0, 4), character, font=face, embedded_color=True)
            box = large.getbbox()
            assert box is not None
            small = large.crop(box)
            small.thumbnail((size, size), Image.Resampling.LANCZOS)
            square = Image.new("RGBA", (size, size))
            square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
            drawn.append(np.asarray(square) * (np.asarray(square)[..., 3:] > 0))
        tables[str(size)] = np.stack(drawn)
    names = np.array(list(EMOJI))
    np.savez_compressed(TARGET, names=names, **tables)


if __name__ == "__main__":
    main(sys.argv[1])
