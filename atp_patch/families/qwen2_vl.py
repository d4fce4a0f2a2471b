"""Qwen-VL, GLM-4V and GLM-4.6V: dynamic grids, read off the multimodal position ids.

The decoder gets (t, h, w) position ids for every token. Within one image or video they *are* the
grid, so it needs no ``image_grid_thw`` (which ``generate`` keeps to itself). Where a caller gives
other position ids, which the plain model takes as they are, the grids are those of
``image_grid_thw`` and ``video_grid_thw``, in the order of the placeholders. Where time stamps stand
between the frames of a video (Qwen3-VL, GLM), each frame is a grid of its own; GLM gives frames the
id of images.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract import GridQuery, Span, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids
from atp_patch.families.towers import packed_tower

IMAGES, VIDEOS = "image_grid_thw", "video_grid_thw"
Films = deque[tuple[int, int, int]]  # frames, rows and columns of tokens


def _grids(query: GridQuery) -> Grids:
    found = _by_positions(query)
    return _by_sizes(query) if found is None else found


def _by_positions(query: GridQuery) -> Grids | None:
    """The grids that multimodal position ids show; None where they show none."""
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
    """The grids of one run of placeholders; ``positions`` is (3, run length): t, h, w."""
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
    """Length of the first stretch that counts up by one."""
    breaks = torch.nonzero(values[1:] != values[:-1] + 1)
    return int(breaks[0, 0]) + 1 if len(breaks) else int(values.shape[0])


def _by_sizes(query: GridQuery) -> Grids:
    """The grids of the images and videos that the call brought, placed where placeholders stand."""
    if not query.grid_thw:
        raise InputError(
            "the position ids of this call do not show the grids of its visual tokens; pass "
            f"{IMAGES} (and {VIDEOS} for videos) of the model's processor with it."
        )
    films = {name: _films(query, name) for name in (IMAGES, VIDEOS)}
    found: Grids = []
    for b, spans in enumerate(query.spans):
        if b % query.repeats:
            found.append(found[-1])
            continue
        kinds = [_kind(query, b, span) for span in spans]
        runs = [_filled(span, kind, films[kind]) for span, kind in zip(spans, kinds, strict=True)]
        found.append([grid for run in runs for grid in run])
    for name, rest in films.items():
        if rest:
            raise InputError(
                f"{name} has {len(rest)} pictures more than the prompts have placeholders for; "
                "pass the grids of these prompts alone."
            )
    return found


def _films(query: GridQuery, name: str) -> Films:
    """The pictures or videos of an argument that counts in patches, in tokens."""
    config: Any = query.config
    side = int(config.vision_config.spatial_merge_size)
    given = query.grid_thw.get(name)
    return (
        deque() if given is None else deque((t, h // side, w // side) for t, h, w in given.tolist())
    )


def _kind(query: GridQuery, sample: int, span: Span) -> str:
    """Which argument holds the grid of a run of placeholders."""
    config: Any = query.config
    if query.ids is None:
        if len(query.grid_thw) > 1:
            raise InputError(
                f"inputs_embeds do not tell images from videos, and both {IMAGES} and {VIDEOS} "
                "came: pass input_ids in place of inputs_embeds, or multimodal position_ids (3, "
                "batch, sequence) as model.model.get_rope_index makes them."
            )
        return next(iter(query.grid_thw))
    before = query.ids[sample, : span.start]
    opened, closed = (
        int((before == getattr(config, f"video_{side}_token_id", -1)).sum())
        for side in ("start", "end")
    )
    return VIDEOS if span.token_id == config.video_token_id or opened > closed else IMAGES


def _filled(span: Span, name: str, films: Films) -> list[VisualGrid]:
    """A run of placeholders as the pictures that come next; frames may stand in several runs."""
    grids = []
    at = span.start
    while at < span.stop:
        frames, height, width = films.popleft() if films else (0, 1, 1)
        there = min(frames, (span.stop - at) // (height * width))
        if not there:
            raise InputError(
                f"{span.length} visual tokens from position {span.start} on are not the pictures "
                f"that {name} says come there; let the model's own processor make both."
            )
        if frames > there:
            films.appendleft((frames - there, height, width))
        grids.append(VisualGrid(at, there, height, width))
        at += there * height * width
    return grids


def _deepstack_layers(config: Any) -> int:
    """After how many decoder layers the features of earlier tower blocks are added."""
    return len(config.vision_config.deepstack_visual_indexes)


QWEN2_VL = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    tower=packed_tower,
    resizable=True,
)
QWEN3_VL = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    late_layers=_deepstack_layers,
    tower=lambda config: None if _deepstack_layers(config) else packed_tower(config),
    resizable=True,
)
GLM4V = Family(
    name="glm4v",
    model_types=("glm4v", "glm4v_moe", "glm46v"),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
)
