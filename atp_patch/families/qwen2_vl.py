"""Qwen-VL, Qwen 3.5, GLM, PaddleOCR-VL, ERNIE 4.5 VL and Cosmos 3 Edge: dynamic grids, read off the
multimodal position ids.

The decoder gets (t, h, w) position ids for every token. Within one image or video they *are* the
grid, so it needs no ``image_grid_thw`` (which ``generate`` keeps to itself). Where a caller gives
other position ids, which the plain model takes as they are, the grids are those of
``image_grid_thw`` and ``video_grid_thw``, in the order of the placeholders. Where time stamps stand
between the frames of a video (Qwen3-VL, GLM, Cosmos), each frame is a grid of its own; GLM gives
frames the id of images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_patch.contract import GridQuery, Span, Tower, VisualGrid
from atp_patch.families.base import Family, Grids
from atp_patch.families.sizes import by_grid_thw
from atp_patch.families.towers import packed_tower, read_tower


def _grids(query: GridQuery) -> Grids:
    found = _by_positions(query)
    return by_grid_thw(query) if found is None else found


def _by_positions(query: GridQuery) -> Grids | None:
    """Return the grids that multimodal position ids show, or None where they show none."""
    positions = query.position_ids
    if positions is None or positions.ndim != 3:
        return None
    thw = positions[-3:].expand(3, len(query.spans), -1)
    found: Grids = []
    for b, spans in enumerate(query.spans):
        runs = [_grid(span, thw[:, b, span.start : span.stop]) for span in spans]
        if None in runs:
            return None
        found.append([grid for run in runs if run is not None for grid in run])
    return found


def _grid(span: Span, positions: Tensor) -> list[VisualGrid] | None:
    """Return the grids of one run of placeholders; ``positions`` is (3, run length): t, h, w."""
    grids = []
    at = 0
    while at < span.length:
        _, h, w = positions[:, at:]
        width = _run(w)
        # A video's frames start over at the same column; another image starts further on.
        moved = torch.nonzero(w[::width] != w[0])
        rows = int(moved[0, 0]) if len(moved) else -(-len(w) // width)
        # Transformers 5.4 counts the rows of a video slower than they come, but has them all.
        height = int(h[: rows * width].max() - h[0]) + 1
        frames = rows // height
        grids.append(VisualGrid(span.start + at, frames, height, width))
        at += rows * width if frames * height == rows else span.length + 1
    return grids if at == span.length else None


def _run(values: Tensor) -> int:
    """Return the length of the first stretch that counts up by one."""
    breaks = torch.nonzero(values[1:] != values[:-1] + 1)
    return int(breaks[0, 0]) + 1 if len(breaks) else int(values.shape[0])


def _deepstack_layers(config: Any) -> int:
    """Return after how many decoder layers the features of earlier tower blocks are added."""
    return len(config.vision_config.deepstack_visual_indexes)


def _projected_tower(config: Any) -> Tower:
    """Return PaddleOCR-VL's tower, whose patches lie row by row, or Cosmos's."""
    return read_tower(
        config,
        modules=("visual",),
        blocks="encoder.layers",
        projector="projector",
        by_rows=config.model_type == "paddleocr_vl",
        cell=int(config.vision_config.spatial_merge_size),
    )


def _ernie_tower(config: Any) -> Tower:
    """Return ERNIE's tower, which sees each frame for itself; its resampler joins two."""
    vision = config.vision_config
    return read_tower(
        config,
        blocks="blocks",
        block=int(vision.depth) - 1,
        attention="attn",
        projector="resampler_model",
        cell=int(vision.spatial_merge_size),
        joined=int(vision.temporal_merge_size),
    )


QWEN2_VL = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    tower=packed_tower,
    resizable=True,
    layout="frames x rows x columns",
)
QWEN3_VL = Family(
    name="qwen3_vl",
    model_types=(
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_omni_moe_thinker",
        "cohere_compass",
        "cosmos3_omni",
    ),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    late_layers=_deepstack_layers,
    tower=lambda config: packed_tower(config, mergeable=not _deepstack_layers(config)),
    resizable=True,
    layout="rows x columns, each frame for itself",
)
PADDLEOCR_VL = Family(
    name="paddleocr_vl",
    model_types=("paddleocr_vl",),
    grids=_grids,
    tower=_projected_tower,
    read_only=True,
    layout="rows x columns",
)
QWEN3_5 = Family(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_moe"),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    tower=packed_tower,
    resizable=True,
    keeps_state=True,
    layout="rows x columns, each frame for itself",
)
COSMOS3_EDGE = Family(
    name="cosmos3_edge",
    model_types=("cosmos3_edge",),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    tower=_projected_tower,
    read_only=True,
    layout="rows x columns, each frame for itself",
)
ERNIE4_5_VL = Family(
    name="ernie4_5_vl",
    model_types=("ernie4_5_vl_moe",),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    told_kinds=True,
    tower=_ernie_tower,
    read_only=True,
    layout="frames x rows x columns",
)
GLM4V = Family(
    name="glm4v",
    model_types=("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"),
    grids=_grids,
    tower=lambda config: packed_tower(config, mergeable=False),
    read_only=True,
    token_ids=("image_token_id", "video_token_id"),
    layout="rows x columns, each frame for itself",
)
