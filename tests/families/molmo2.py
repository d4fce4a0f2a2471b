"""Molmo 2: the whole and the picture, rows that end in a mark; all of it attends both ways."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Kind, Paint
from tests.families.square import _shrunk, _tiles
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

PATCH, FRAMES = 4, 3
LOW, START, END, COL, FRAME, FRAME_END = 3, 6, 7, 9, 4, 8
CROP, CELL = 32, 2  # a crop has 8 x 8 patches, four of which make a token
MARKS = (tiny.IMAGE, LOW, START, END, COL, FRAME, FRAME_END)


def _molmo2() -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision = {**TOWER, **heads, "image_size": [CROP, CROP], "patch_size": PATCH}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
    return transformers.Molmo2Config(
        vision_config=vision,
        adapter_config={
            **heads,
            "hidden_size": 32,
            "intermediate_size": 48,
            "vision_feature_layer": [-1, 0],
            "text_hidden_size": tiny.HIDDEN,
        },
        text_config={
            **TEXT,
            "rope_parameters": rope,
            "rope_scaling_layers": [0, 1, 5],
            "additional_vocab_size": 8,
        },
        image_patch_id=tiny.IMAGE,
        image_start_token_id=START,
        low_res_image_start_token_id=LOW,
        image_end_token_id=END,
        frame_start_token_id=FRAME,
        frame_end_token_id=FRAME_END,
    )


def _cut(crops: Tensor) -> Tensor:
    """(crops, 3, CROP, CROP) -> (crops, patches, values), patches row by row."""
    rows = crops.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # N, 3, rows, columns, P, P
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)


def _cells(numbers: Tensor) -> Tensor:
    """(rows, columns) numbers of patches -> (tokens, CELL * CELL), token by token."""
    cells = numbers.unfold(0, CELL, CELL).unfold(1, CELL, CELL)
    return cells.flatten(0, 1).flatten(1)


def _side_by_side(count: int, first: int) -> Tensor:
    """(rows, columns) numbers of the patches of ``count`` crops that lie next to each other."""
    side = CROP // PATCH
    crops = torch.arange(count * side**2).view(count, side, side) + first * side**2
    return torch.cat(list(crops), 1)


def _rows(drawn: Drawn, grid: int, height: int, width: int, *, marks: bool) -> None:
    for row in range(height):
        for column in range(width):
            drawn.put(tiny.IMAGE, grid, 0, row, column)
        if marks:
            drawn.mark(COL)


def _molmo2_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    side = CROP // PATCH // CELL
    drawn = Drawn()
    if which == VIDEO:
        for frame in range(FRAMES):
            drawn.mark(tiny.FIRST_WORD + frame, FRAME)
            _rows(drawn, frame, side, side, marks=False)
            drawn.mark(FRAME_END)
        frames = _cut(torch.stack([paint(CROP, CROP) for _ in range(FRAMES)]))
        cells = [_cells(_side_by_side(1, frame)) for frame in range(FRAMES)]
        drawn.tensors = {"pixel_values_videos": frames, "video_token_pooling": torch.cat(cells)}
        drawn.tensors["video_grids"] = torch.tensor([[FRAMES, side, side]])
        return drawn
    tiles = 1 + which
    picture = paint(CROP, CROP * tiles)
    drawn.mark(LOW)
    _rows(drawn, 0, side, side, marks=bool(which))  # processors may leave marks out of the whole
    drawn.mark(END, START)
    _rows(drawn, 1, side, side * tiles, marks=True)
    drawn.mark(END)
    pooling = torch.cat([_cells(_side_by_side(1, 0)), _cells(_side_by_side(tiles, 1))])
    drawn.tensors = {
        "pixel_values": _cut(torch.cat([_shrunk(picture, CROP), _tiles(picture, CROP)])),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[side, side, side, side * tiles]]),
    }
    return drawn


def _molmo2_collate(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """Patches of all pictures in one row; what is pooled counts on from picture to picture."""
    marks = torch.tensor(MARKS)
    made: Inputs = {"mm_token_type_ids": torch.isin(inputs["input_ids"], marks).long()}
    every = [picture.tensors for row in pictures for picture in row]
    for pixels, pooling, grids in (
        ("pixel_values", "image_token_pooling", "image_grids"),
        ("pixel_values_videos", "video_token_pooling", "video_grids"),
    ):
        tensors = [tensors for tensors in every if pixels in tensors]
        if not tensors:
            continue
        made[pixels] = torch.cat([one[pixels] for one in tensors])
        made[grids] = torch.cat([one[grids] for one in tensors])
        counted, before = [], 0
        for one in tensors:
            counted.append(one[pooling] + before)
            before += one[pixels].shape[:2].numel()
        made[pooling] = torch.cat(counted)
    return made


def _molmo2_blocks(inputs: Inputs) -> Tensor:
    return torch.where(inputs["mm_token_type_ids"] == 1, 0, -1)


# Absent from early versions of transformers.
MODEL = getattr(transformers, "Molmo2ForConditionalGeneration", None)
KINDS = (
    ()
    if MODEL is None
    else (
        Kind(
            "molmo2",
            MODEL,
            _molmo2,
            _molmo2_picture,
            _molmo2_collate,
            blocks=_molmo2_blocks,
            videos=True,
            mixes=False,
        ),
    )
)
