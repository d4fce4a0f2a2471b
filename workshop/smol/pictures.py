"""Pictures for training: documents and scenes, of which it is known what stands where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atp_patch.builtin.documents import KINDS, draw_document
from atp_patch.builtin.documents.canvas import Box, Writing
from atp_patch.builtin.dynamic.sizes import laid_out, scene_size
from atp_patch.builtin.glyphs import CELL_HEIGHT_PX, CELL_WIDTH_PX
from atp_patch.builtin.questions import ask
from atp_patch.builtin.render import draw
from atp_patch.builtin.scenes import (
    PATCH_PX,
    Layout,
    Question,
    SceneConfig,
    sample_layout,
    scene_rng,
)
from atp_patch.builtin.vocabulary import TASKS
from workshop.dynamic.labels import token_owners
from workshop.smol.labels import Labels, add_colours, add_icons, add_objects, add_writings, blank
from workshop.smol.pieces import Pieces

SCENE = "scene"
NOISE = 6.0
_COLOURED = ("chart", "map")
"""Kinds of documents with coloured marks."""
_STREAM = 4000  # stream of random numbers; documents and scenes use other streams


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        kind: the kind of document, or SCENE.
        clean: (height, width, 3) float32, the picture without noise.
        writings: its texts.
        icons: names and boxes of its icons.
        questions: questions about it.
        layout: the contents of a scene, or None.
        owners: (rows, columns) of a scene's patches, as `token_owners` gives them, or None.
    """

    kind: str
    clean: NDArray[np.float32]
    writings: Sequence[Writing]
    icons: Sequence[tuple[str, Box]]
    questions: Sequence[Question]
    layout: Layout | None = None
    owners: NDArray[np.int64] | None = None

    def pixels(
        self, rng: np.random.Generator, left: int, top: int, size_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """(height, width, 3) uint8, a window with noise.

        Args:
            rng: the random generator of the noise.
            left, top: where the window begins.
            size_px: (width, height) of the window.
        """
        clean = self.clean[top : top + size_px[1], left : left + size_px[0]]
        noisy = clean + NOISE * rng.standard_normal(clean.shape, dtype=np.float32)
        return noisy.clip(0, 255).astype(np.uint8)

    def labels(self, pieces: Pieces, left: int, top: int, size_px: tuple[int, int]) -> Labels:
        """Label a window.

        Args:
            pieces: gives the tokens of texts.
            left, top: where the window begins; in a scene, multiples of PATCH_PX.
            size_px: (width, height) of the window, multiples of PATCH_PX.
        """
        labels = blank(*size_px)
        if self.layout is None or self.owners is None:
            clean = self.clean[top : top + size_px[1], left : left + size_px[0]]
            if self.kind in _COLOURED:
                add_colours(labels, clean, pieces)
            add_icons(labels, self.icons, pieces, left, top)
        else:
            row, column = top // PATCH_PX, left // PATCH_PX
            rows, columns = labels.pieces.shape
            owners = self.owners[row : row + rows, column : column + columns]
            add_objects(labels, self.layout, owners, pieces, left, top)
        add_writings(labels, self.writings, pieces, left, top)
        return labels


def make_picture(
    kind: str, split: str, index: int, *, rounds: int = 0, size_px: tuple[int, int] | None = None
) -> Picture:
    """Make a picture.

    Args:
        kind: a kind of document, or SCENE.
        split: "train", "development" or "test".
        index: number of the picture.
        rounds: number of times that each task is asked about.
        size_px: (width, height) of a document, by default from its own range; of scenes the size
            does not depend on it.
    """
    rng = scene_rng(split, index, _STREAM)
    if kind == SCENE:
        return _scene(rng, split, index, rounds)
    canvas, said = draw_document(kind, split, index, size_px=size_px)
    asked = [KINDS[kind].ask(said, rng, task) for _ in range(rounds) for task in KINDS[kind].tasks]
    questions = list(dict.fromkeys(question for question in asked if question is not None))
    return Picture(kind, canvas.pixels, canvas.writings, canvas.icons, questions)


def _scene(rng: np.random.Generator, split: str, index: int, rounds: int) -> Picture:
    size_px = scene_size(split, index)
    config = SceneConfig(min_objects=2, sign_share=0.7, sign_step_px=1)
    layout = laid_out(sample_layout(rng, config), size_px)
    clean = np.asarray(draw(layout, rng, 0.0, size_px)).astype(np.float32)
    writings = []
    if layout.sign is not None:
        sign = layout.sign
        left, top = sign.x_px + PATCH_PX, sign.y_px + PATCH_PX
        edges = left + CELL_WIDTH_PX * np.arange(len(sign.text) + 1)
        writings.append(Writing(sign.text, edges, top, top + CELL_HEIGHT_PX))
    questions = list(dict.fromkeys(ask(layout, rng, TASKS * rounds))) if rounds else []
    owners = token_owners(layout, size_px, PATCH_PX)
    return Picture(SCENE, clean, writings, (), questions, layout, owners)
