"""Training batches of the second model, each with scenes on canvases of one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atp_patch.builtin.dynamic.sizes import (
    SIDES_PX,
    at_size,
    scene_size,
)
from atp_patch.builtin.scenes import make_scene
from workshop.batches import Batch, BatchSpec, make_batch
from workshop.dynamic.labels import token_middles, token_owners


@dataclass(frozen=True)
class SizedSpec(BatchSpec):
    """The contents of batches. All scenes of a batch have the size of its first one."""

    sides_px: tuple[int, ...] = SIDES_PX


def sized_batch(spec: SizedSpec, number: int) -> Batch:
    """Make a batch as `make_batch` does, with more entries.

    These are:

    - `shown`: (images, height, width, 3) uint8, the pictures on the canvas.
    - `token_owners`, `token_near` and `token_middle`: (images, tokens), what visual tokens show.
    """
    batch = make_batch(spec, number)
    start = spec.offset + number * spec.images
    size = scene_size(spec.split, start, spec.sides_px)
    pictures, owners, middles = [], [], []
    for index in range(start, start + spec.images):
        scene = make_scene(spec.split, index, spec.scenes, tasks=())
        scene = at_size(scene, size, spec.scenes.noise)
        pictures.append(np.asarray(scene.image))
        owners.append(token_owners(scene.layout, size).ravel())
        middles.append([part.ravel() for part in token_middles(scene.layout, size)])
    near, share = zip(*middles, strict=True)
    return batch | {
        "shown": np.stack(pictures),
        "token_owners": np.stack(owners),
        "token_near": np.stack(near),
        "token_middle": np.stack(share),
    }
