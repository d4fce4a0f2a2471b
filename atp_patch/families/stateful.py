"""Families whose decoders keep states and count tokens, so that the call's sizes tell the grids.

LFM2-VL cuts a large picture into tiles, each behind a mark of its place, and shows the whole once
more, smaller, behind them. MiniCPM-V shows the whole picture first, and slices of it between marks
behind it. Each tile, slice or video frame is a grid of its own.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from atp_patch.contract import GridQuery, Span, Tower, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids
from atp_patch.families.sizes import Films, by_grid_thw, in_order, mismatch, whole
from atp_patch.families.towers import mixed_tower, naflex_tower

SHAPES, SLICES, FRAMES = "spatial_shapes", "target_sizes", "target_sizes_videos"


def _patches(query: GridQuery, name: str) -> Films:
    """Return the pictures of an argument that holds rows and columns of patches."""
    given = query.sizes_given.get(name)
    return deque() if given is None else deque((1, h, w) for h, w in given.tolist())


def _lfm2_grids(query: GridQuery) -> Grids:
    config: Any = query.config
    if SHAPES not in query.sizes_given:
        raise _missing(SHAPES)
    cell = int(config.downsample_factor)
    films = deque((1, h // cell, w // cell) for _, h, w in _patches(query, SHAPES))
    return in_order(query, {SHAPES: films}, lambda _, span: SHAPES, whole)


def _minicpm_grids(query: GridQuery) -> Grids:
    config: Any = query.config
    films = {name: _patches(query, name) for name in (SLICES, FRAMES)}
    if not any(films.values()):
        raise _missing(f"{SLICES} (and {FRAMES} for videos)")
    merge = int(config.merge_kernel_size[0]) ** int(config.merger_times)

    def kind(sample: int, span: Span) -> str:
        if query.ids is None:
            return next(name for name, sizes in films.items() if sizes)
        return FRAMES if span.token_id == config.video_token_id else SLICES

    def place(span: Span, name: str, left: Films) -> list[VisualGrid]:
        """Return the one picture of a run; its length tells whether the call merges patches
        twice.
        """
        _, height, width = left.popleft() if left else (0, 0, 0)
        for cell in (2 * merge, merge):
            rows, columns = height // cell, width // cell
            if rows * columns == span.length:
                return [VisualGrid(span.start, 1, rows, columns)]
        raise mismatch(span, name)

    return in_order(query, films, kind, place)


def _missing(names: str) -> InputError:
    return InputError(
        "nothing else tells the rows of this model's images: pass "
        f"{names} of the model's processor with the call, to generate too."
    )


def _lfm3_tower(config: Any) -> Tower | None:
    """Return LFM3-VL's tower, some of whose blocks are convolutions."""
    return mixed_tower(config, cell=int(config.vision_config.spatial_merge_size))


LFM2_VL = Family(
    name="lfm2_vl",
    model_types=("lfm2_vl",),
    grids=_lfm2_grids,
    tower=naflex_tower,
    read_only=True,
    keeps_state=True,
    layout="rows x columns of each tile, then of the whole",
)
LFM3_VL = Family(
    name="lfm3_vl",
    model_types=("lfm3_vl",),
    grids=by_grid_thw,
    token_ids=("image_token_id", "video_token_id"),
    keeps_state=True,
    tower=_lfm3_tower,
    read_only=True,
    layout="rows x columns, each frame for itself",
)
MINICPM_V = Family(
    name="minicpm_v",
    model_types=("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
    grids=_minicpm_grids,
    token_ids=("image_token_id", "video_token_id"),
    keeps_state=True,
    layout="rows x columns of the whole, then of each slice",
)
