"""Repainted scenes, with every object in a shade of its colour that training never showed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from atp_patch.builtin import Scene
from atp_patch.builtin.render import outline
from atp_patch.builtin.scenes import scene_rng
from atp_patch.builtin.vocabulary import BACKGROUND_COLOURS, OBJECT_COLOURS

LEAST_SHIFT, MOST_SHIFT = 26, 40
"""By how much, 0-255, at least one channel of a shade is off the colour's mean. Training's shades
are off by 12 at most in every channel, so the two never meet."""

_STREAM = 1_000  # number of the random stream; the generator's own streams have small numbers


def repaint(scene: Scene) -> Image.Image:
    """Return the scene's picture with the pixels of each object shifted to another shade of its
    colour.

    The pixels keep their noise. A shade is nearer to the mean of its own colour than to that of any
    other, so the true answers stay true.
    """
    rng = scene_rng(scene.split, scene.index, _STREAM)
    pixels = np.asarray(scene.image).astype(np.int16)
    for item in scene.objects:
        mask = Image.new("1", scene.image.size)
        ImageDraw.Draw(mask).polygon(outline(item), fill=1)
        inside = np.asarray(mask)
        painted = pixels[inside].mean(0)  # (3,) the colour that the generator drew
        pixels[inside] += np.round(shade(item.colour, rng) - painted).astype(np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shade(colour: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return an unseen shade of an object's colour, (3,) RGB values from 0 to 255."""
    mean = np.array(OBJECT_COLOURS[colour], dtype=np.float64)
    others = [
        np.array(rgb)
        for name, rgb in (OBJECT_COLOURS | BACKGROUND_COLOURS).items()
        if name != colour
    ]
    while True:
        shift = rng.uniform(-1, 1, size=3)
        shift *= rng.uniform(LEAST_SHIFT, MOST_SHIFT) / np.abs(shift).max()
        candidate = (mean + shift).clip(0, 255)
        off = np.abs(candidate - mean).max()
        nearest_other = min(np.linalg.norm(candidate - other) for other in others)
        if off >= LEAST_SHIFT and np.linalg.norm(candidate - mean) < 0.8 * nearest_other:
            return candidate
