"""Drawing a layout: a textured background, a plate with characters, flat objects, and noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from atp_patch.builtin.glyphs import CELL_HEIGHT_PX, CELL_WIDTH_PX, glyph
from atp_patch.builtin.scenes import IMAGE_PX, PATCH_PX, Layout, Plate, SceneObject, Sign
from atp_patch.builtin.vocabulary import BACKGROUND_COLOURS, OBJECT_COLOURS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PLATE = (236, 232, 214)
_INK = (12, 12, 16)
_TEXTURE_CONTRAST = 17.0
_COLOUR_JITTER = 12


def draw(
    layout: Layout,
    rng: np.random.Generator,
    noise: float,
    size: tuple[int, int] = (IMAGE_PX, IMAGE_PX),
) -> PILImage.Image:
    """Draw the RGB image of a layout, of (width, height) pixels, by default 192 x 192."""
    canvas = _background(layout, rng, size)
    image = PILImage.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for item in layout.objects:
        _draw_object(pen, item, rng)
    pixels = np.asarray(image).astype(np.float32)
    if layout.sign is not None:
        _draw_sign(pixels, layout.sign)
    if layout.plate is not None:
        _draw_plate(pixels, layout.plate)
    pixels += noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _background(
    layout: Layout, rng: np.random.Generator, size: tuple[int, int]
) -> NDArray[np.uint8]:
    base = np.array(BACKGROUND_COLOURS[layout.background], dtype=np.float32)
    base = base + rng.uniform(-8, 8, size=3).astype(np.float32)
    y, x = np.mgrid[: size[1], : size[0]]
    x = x + int(rng.integers(16))
    y = y + int(rng.integers(16))
    if layout.texture == "striped":
        field = ((x + y) // 6) % 2 * 2.0 - 1.0
    elif layout.texture == "checked":
        field = ((x // 8) + (y // 8)) % 2 * 2.0 - 1.0
    elif layout.texture == "dotted":
        field = np.where(((x % 12) - 6) ** 2 + ((y % 12) - 6) ** 2 <= 10, 2.0, 0.0)
    else:
        field = np.zeros(x.shape)
    pixels = base + _TEXTURE_CONTRAST * field[..., None]
    return pixels.clip(0, 255).astype(np.uint8)


def outline(item: SceneObject) -> list[tuple[float, float]]:
    """Return the corners (x, y) of an object's outline in pixels; a circle has 40."""
    x, y, r = item.x_px, item.y_px, item.radius_px
    if item.shape == "circle":
        turns = [2 * math.pi * k / 40 for k in range(40)]
        return [(x + r * math.cos(t), y + r * math.sin(t)) for t in turns]
    if item.shape == "square":
        s = 0.88 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if item.shape == "triangle":
        return [(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)]
    if item.shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if item.shape == "cross":
        a = 0.36 * r
        corners = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a)]
        corners += [(-dx, -dy) for dx, dy in corners]
        return [(x + dx, y + dy) for dx, dy in corners]
    if item.shape == "star":
        points = []
        for k in range(10):
            turn = -math.pi / 2 + math.pi * k / 5
            reach = r if k % 2 == 0 else 0.45 * r
            points.append((x + reach * math.cos(turn), y + reach * math.sin(turn)))
        return points
    raise ValueError(f"no shape {item.shape!r}")


def _draw_object(pen: ImageDraw.ImageDraw, item: SceneObject, rng: np.random.Generator) -> None:
    jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    base = OBJECT_COLOURS[item.colour]
    red, green, blue = (int(min(255, max(0, b + j))) for b, j in zip(base, jitter, strict=True))
    pen.polygon(outline(item), fill=(red, green, blue))


def _draw_blank(pixels: NDArray[np.float32], plate: Sign | Plate) -> None:
    bottom, right = plate.y_px + plate.height_px, plate.x_px + plate.width_px
    pixels[plate.y_px : bottom, plate.x_px : right] = _INK
    pixels[plate.y_px + 2 : bottom - 2, plate.x_px + 2 : right - 2] = _PLATE


def _draw_plate(pixels: NDArray[np.float32], plate: Plate) -> None:
    """Draw a plate without characters into `pixels` (192, 192, 3), in place."""
    _draw_blank(pixels, plate)
    inner = pixels[
        plate.y_px + PATCH_PX : plate.y_px + plate.height_px - PATCH_PX,
        plate.x_px + PATCH_PX : plate.x_px + plate.width_px - PATCH_PX,
    ]
    y, x = np.mgrid[: inner.shape[0], : inner.shape[1]]
    if plate.marks == "bars":
        inner[y // 3 % 2 == 1] = _INK
    elif plate.marks == "spots":
        inner[(x % 8 - 4) ** 2 + (y % 8 - 4) ** 2 <= 5] = _INK


def _draw_sign(pixels: NDArray[np.float32], sign: Sign) -> None:
    """Draw the plate and its characters into `pixels` (192, 192, 3), in place."""
    _draw_blank(pixels, sign)
    top = sign.y_px + PATCH_PX
    for k, character in enumerate(sign.text):
        left = sign.x_px + PATCH_PX + k * CELL_WIDTH_PX
        cell = pixels[top : top + CELL_HEIGHT_PX, left : left + CELL_WIDTH_PX]
        cell[glyph(character, sign.font)] = _INK
