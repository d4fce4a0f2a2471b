"""Batches of windows that are cut out of documents and scenes, with dense labels.

A window has few patches, so attention in it is cheap, and it is cut where much is written. So the
tower sees many characters for its arithmetic.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import AutoTokenizer

from atp_patch.builtin.scenes import PATCH_PX, scene_rng
from workshop.batches import Batch
from workshop.smol.labels import FIELDS
from workshop.smol.pictures import SCENE, Picture, make_picture
from workshop.smol.pieces import Pieces

KIND_OF: tuple[str, ...] = (
    *("page",) * 8,
    *("table",) * 2,
    *("chart",) * 2,
    "map",
    "icons",
    *(SCENE,) * 2,
)
"""Kinds of pictures, as often as they are drawn."""
_AHEAD = 4
"""Number of batches that are made ahead."""
_STREAM = 4001  # stream of random numbers; pictures use another one


@dataclass(frozen=True)
class WindowSpec:
    """The contents of batches of windows.

    Attributes:
        windows: number of windows in a batch.
        per_picture: number of windows that are cut out of a picture.
        shapes_px: (width, height) of windows; all windows of a batch have the same.
        split: "train", "development" or "test".
        offset: number of the first picture.
        base: folder of the decoder, whose tokenizer names the pieces.
    """

    base: Path

    windows: int = 32
    per_picture: int = 8
    shapes_px: tuple[tuple[int, int], ...] = ((96, 96), (144, 64), (192, 48), (64, 144))
    split: str = "train"
    offset: int = 0


@cache
def pieces_of(base: Path) -> Pieces:
    """Load the tokenizer of a decoder."""
    return Pieces(AutoTokenizer.from_pretrained(base))


def window_batch(spec: WindowSpec, number: int) -> Batch:
    """Make batch ``number``.

    Returns:
        ``pixels``: (windows, height, width, 3) uint8; ``patches``: (windows, patches, FIELDS) and
        ``pieces``: (windows, patches), both int64, in raster order.
    """
    size = spec.shapes_px[number % len(spec.shapes_px)]
    first = spec.offset + number * (spec.windows // spec.per_picture)
    made = [
        window
        for index in range(first, first + spec.windows // spec.per_picture)
        for window in _windows(spec, index, size)
    ]
    return {name: np.stack([window[name] for window in made]) for name in made[0]}


def _windows(spec: WindowSpec, index: int, size: tuple[int, int]) -> list[Batch]:
    rng = scene_rng(spec.split, index, _STREAM)
    kind = KIND_OF[int(rng.integers(len(KIND_OF)))]
    picture = make_picture(kind, spec.split, index)
    return [_window(picture, rng, pieces_of(spec.base), size) for _ in range(spec.per_picture)]


def _window(
    picture: Picture, rng: np.random.Generator, pieces: Pieces, size: tuple[int, int]
) -> Batch:
    """Cut a window out of a picture, most often around one of its texts."""
    height, width = picture.clean.shape[:2]
    middle = (int(rng.integers(width)), int(rng.integers(height)))
    if picture.writings and (picture.layout is None or rng.random() < 0.5):
        around = picture.writings[int(rng.integers(len(picture.writings)))]
        middle = (int(around.edges[[0, -1]].mean()), (around.top + around.bottom) // 2)
    left, top = (
        int(np.clip(at - rng.integers(side // 4, side - side // 4), 0, most - side))
        for at, side, most in zip(middle, size, (width, height), strict=True)
    )
    if picture.layout is not None:  # the owners of its patches are known, not of other places
        left, top = (at // PATCH_PX * PATCH_PX for at in (left, top))
    labels = picture.labels(pieces, left, top, size)
    return {
        "pixels": picture.pixels(rng, left, top, size),
        "patches": labels.patches.reshape(-1, len(FIELDS)),
        "pieces": labels.pieces.reshape(-1),
    }


Spec = TypeVar("Spec")


def made_ahead(
    make: Callable[[Spec, int], Batch], spec: Spec, first: int, stop: int
) -> Iterator[Batch]:
    """Give batches ``first`` to ``stop - 1``, which a second process makes ahead."""
    # "spawn", because a fork of a process in which torch threads run may hang.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ahead = range(first, min(first + _AHEAD, stop))
        pending = [pool.apply_async(make, (spec, number)) for number in ahead]
        for number in range(first, stop):
            yield pending.pop(0).get()
            if number + _AHEAD < stop:
                pending.append(pool.apply_async(make, (spec, number + _AHEAD)))
