"""A picture on which text, rectangles and lines are drawn, and boxes of what was drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from atp_patch.builtin.documents.fonts import Font

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; ``right`` and ``bottom`` are just outside it."""

    left: int
    top: int
    right: int
    bottom: int

    def tokens(self, token_px: int, width_px: int, height_px: int) -> set[tuple[int, int]]:
        """Return the (row, column) of each visual token that the box touches.

        Args:
            token_px: side of the square that one visual token shows.
            width_px, height_px: size of the picture; the last row or column may be cut.
        """
        rows = range(max(self.top, 0) // token_px, -(-min(self.bottom, height_px) // token_px))
        columns = range(max(self.left, 0) // token_px, -(-min(self.right, width_px) // token_px))
        return {(row, column) for row in rows for column in columns}


@dataclass(frozen=True)
class Writing:
    """A text that stands on a canvas.

    Attributes:
        text: the text.
        edges: (characters + 1,) int64, the column in pixels where each character begins, and where
            the last one ends.
        top, bottom: first row in pixels, and the row below the last one.
    """

    text: str
    edges: NDArray[np.int64]
    top: int
    bottom: int


class Canvas:
    """A picture that is being drawn.

    Attributes:
        width_px, height_px: size of the picture.
        writings: the texts on it, in the order in which they were written.
        icons: the names of the icons on it with their boxes.
    """

    def __init__(self, width_px: int, height_px: int, paper: Colour) -> None:
        self.width_px, self.height_px = width_px, height_px
        self.writings: list[Writing] = []
        self.icons: list[tuple[str, Box]] = []
        self._pixels: NDArray[np.float32] = np.empty((height_px, width_px, 3), dtype=np.float32)
        self._pixels[:] = paper

    def text(self, font: Font, text: str, left: int, top: int, ink: Colour) -> Box:
        """Write a text with its upper left corner at (left, top).

        Raises:
            ValueError: if the text would leave the picture.
        """
        mask = font.ink(text).astype(np.float32)[..., None] / 255
        height, width = mask.shape[:2]
        box = Box(left, top, left + width, top + height)
        if left < 0 or top < 0 or box.right > self.width_px or box.bottom > self.height_px:
            raise ValueError(f"{text!r} at {(left, top)} leaves the picture.")
        under = self._pixels[top : box.bottom, left : box.right]
        under += mask * (np.array(ink, dtype=np.float32) - under)
        self.writings.append(Writing(text, left + font.edges_px(text), top, box.bottom))
        return box

    def icon(self, name: str, picture: NDArray[np.uint8], left: int, top: int) -> Box:
        """Draw an RGBA picture with its upper left corner at (left, top).

        Raises:
            ValueError: if the picture would leave the canvas.
        """
        height, width = picture.shape[:2]
        box = Box(left, top, left + width, top + height)
        if left < 0 or top < 0 or box.right > self.width_px or box.bottom > self.height_px:
            raise ValueError(f"the icon {name!r} at {(left, top)} leaves the picture.")
        under = self._pixels[top : box.bottom, left : box.right]
        opacity = picture[..., 3:].astype(np.float32) / 255
        under += opacity * (picture[..., :3].astype(np.float32) - under)
        self.icons.append((name, box))
        return box

    def fill(self, box: Box, colour: Colour) -> Box:
        """Fill a rectangle."""
        self._pixels[box.top : box.bottom, box.left : box.right] = colour
        return box

    def lines(self, points: list[tuple[int, int]], colour: Colour, width_px: int) -> None:
        """Draw straight lines from each point (x, y) to the next."""
        with self._pen() as pen:
            pen.line(points, fill=colour, width=width_px)

    def dot(self, x: int, y: int, radius_px: int, colour: Colour) -> Box:
        """Draw a filled circle."""
        edges = (x - radius_px, y - radius_px, x + radius_px, y + radius_px)
        with self._pen() as pen:
            pen.ellipse(edges, fill=colour)
        return Box(edges[0], edges[1], edges[2] + 1, edges[3] + 1)

    @contextmanager
    def _pen(self) -> Iterator[ImageDraw.ImageDraw]:
        """Pillow's pen on the picture, which afterwards holds what was drawn."""
        image = Image.fromarray(self._pixels.clip(0, 255).astype(np.uint8))
        yield ImageDraw.Draw(image)
        self._pixels[:] = np.asarray(image)

    @property
    def pixels(self) -> NDArray[np.float32]:
        """(height_px, width_px, 3) float32, 0 to 255, the picture without noise; not a copy."""
        return self._pixels

    def image(self, rng: np.random.Generator, noise: float) -> Image.Image:
        """Return the RGB picture with normally distributed noise on its pixels.

        Args:
            rng: the random generator of the noise.
            noise: standard deviation of the noise, 0 to 255.
        """
        noisy = self._pixels + noise * rng.standard_normal(self._pixels.shape, dtype=np.float32)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
