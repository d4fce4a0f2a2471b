"""Gemma 4: pictures of any size, whose grids are those of their patches' positions.

The processor gives the column and row of each patch, and the model joins cells of patches to one
token. (The unified model is given patches that are joined already.) A video's frames are pictures
with time stamps between them. Images attend both ways in the sliding layers of the larger models.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from atp_patch.contract import GridQuery, Span, Tower
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids
from atp_patch.families.sizes import Films, in_order, whole
from atp_patch.families.towers import read_tower

IMAGES, FRAMES = "image_position_ids", "video_position_ids"


def _grids(query: GridQuery) -> Grids:
    config: Any = query.config
    joined = getattr(config, "model_type", None) == "gemma4_unified"
    cell = 1 if joined else int(config.vision_config.pooling_kernel_size)
    films = {name: _pictures(query, name, cell) for name in (IMAGES, FRAMES)}
    if not any(films.values()):
        raise InputError(
            f"the grids of this call's visual tokens are not known; pass {IMAGES} (and {FRAMES} "
            "for videos) of the model's processor with it."
        )

    def kind(sample: int, span: Span) -> str:
        if query.ids is None:
            return IMAGES if films[IMAGES] else FRAMES
        return FRAMES if span.token_id == config.video_token_id else IMAGES

    return in_order(query, films, kind, whole)


def _pictures(query: GridQuery, name: str, cell: int) -> Films:
    """Return the grids of an argument (..., patches, 2), which holds (column, row) and -1 as
    padding.

    Early versions of transformers keep the frames of each video apart.

    Args:
        query: what is known of the call.
        name: the name of the argument.
        cell: how many patches along each side make one token.
    """
    given = query.sizes_given.get(name)
    if given is None:
        return deque()
    sides = (given.flatten(0, -3).amax(1) + 1) // cell  # (pictures, 2): columns, rows
    return deque((1, rows, columns) for columns, rows in sides.tolist() if rows and columns)


def _tower(config: Any) -> Tower | None:
    """Return the tower of Gemma 4, which the unified model has not."""
    if config.model_type != "gemma4" or config.vision_config is None:
        return None
    return read_tower(
        config,
        blocks="encoder.layers",
        projector="embed_vision",
        packed=False,
        by_rows=True,
        cell=int(config.vision_config.pooling_kernel_size),
        sizes="pixel_position_ids",
    )


GEMMA4 = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_unified"),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    causal=False,
    tower=_tower,
    read_only=True,
    layout="rows x columns of pooled patches; each frame for itself",
)
