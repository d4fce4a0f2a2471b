"""More families whose rotary positions carry the places of pictures: PaddleOCR-VL, GLM-OCR, ERNIE,
Cosmos 3, Cohere's North Vision.

An early version of transformers may lack some of them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Paint, installed
from tests.families.mrope import (
    ROPE,
    _collate,
    _collate_glm,
    _gentle,
    _glm,
    _glm_picture,
    _picture,
    _qwen3,
)
from tests.families.sized import _cells
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

SIZES = ((4, 6), (5, 7))
PATCH, MERGE = 4, 2


# -- PaddleOCR-VL: images alone, patches row by row ------------------------------------------------


def _paddleocr_vl() -> Any:
    return transformers.PaddleOCRVLConfig(
        vision_config={
            **TOWER,
            "image_size": 64,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        text_config={**TEXT, "rope_parameters": ROPE},
        **tiny._qwen_ids(),
    )


def _row_by_row(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    rows, columns = SIZES[which]
    height, width = rows * MERGE, columns * MERGE
    picture = paint(height * PATCH, width * PATCH)
    patches = picture.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # 3, rows, columns, P, P
    drawn = Drawn(
        tensors={
            "pixel_values": patches.permute(1, 2, 0, 3, 4).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
    )
    drawn.mark(tiny.VISION_START)
    drawn.square(tiny.IMAGE, 0, rows, columns)
    drawn.mark(tiny.VISION_END)
    return drawn


# -- GLM-OCR: as GLM-4V, without learned places ----------------------------------------------------


def _glm_ocr() -> Any:
    return _glm(transformers.GlmOcrConfig)


# -- ERNIE 4.5 VL: experts of text and of pictures; two frames of a video make one -----------------


def _ernie() -> Any:
    text = {
        **TEXT,
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [48, 32],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    return transformers.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        image_start_token_id=tiny.VISION_START,
        image_end_token_id=tiny.VISION_END,
        video_start_token_id=3,
        video_end_token_id=4,
    )


def _joined_frames(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    rows, columns = SIZES[which % 2]
    size = rows * MERGE * PATCH, columns * MERGE * PATCH
    frames = [paint(*size) for _ in range(4 if which == VIDEO else 1)]
    drawn = Drawn()
    thw = torch.tensor([[len(frames), rows * MERGE, columns * MERGE]])
    patches = torch.cat([_cells(frame, MERGE) for frame in frames])
    if which == VIDEO:
        drawn.mark(3)
        for frame in range(2):
            drawn.square(tiny.VIDEO, 0, rows, columns, frame)
        drawn.mark(4)
        drawn.tensors = {"pixel_values_videos": patches, "video_grid_thw": thw}
        return drawn
    drawn.mark(tiny.VISION_START)
    drawn.square(tiny.IMAGE, 0, rows, columns)
    drawn.mark(tiny.VISION_END)
    drawn.tensors = {"pixel_values": patches, "image_grid_thw": thw}
    return drawn


def _collate_ernie(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    marks = torch.isin(ids, torch.tensor([tiny.VISION_START, tiny.VISION_END, 3, 4]))
    made = _collate(pictures, inputs)
    return {**made, "moe_mm_token_type_ids": made["mm_token_type_ids"] + marks.long()}


# -- Cosmos 3 Edge: as Qwen3-VL, without features in later layers ----------------------------------


def _cosmos() -> Any:
    return transformers.Cosmos3EdgeConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={
            **TOWER,
            "patch_size": PATCH,
            "num_patches": 64,
            "spatial_merge_size": MERGE,
        },
        projector_hidden_size=96,
        **tiny._qwen_ids(),
    )


def _each_frame(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """Each frame of a video stands alone behind its time stamp."""
    rows, columns = SIZES[which % 2]
    size = rows * MERGE * PATCH, columns * MERGE * PATCH
    frames = [paint(*size) for _ in range(3 if which == VIDEO else 1)]
    drawn = Drawn()
    for frame in range(len(frames)):
        if which == VIDEO:
            drawn.mark(tiny.FIRST_WORD + frame)
        drawn.mark(tiny.VISION_START)
        drawn.square(tiny.VIDEO if which == VIDEO else tiny.IMAGE, frame, rows, columns)
        drawn.mark(tiny.VISION_END)
    thw = torch.tensor([[len(frames), rows * MERGE, columns * MERGE]])
    names = ("pixel_values_videos", "video_grid_thw")
    if which != VIDEO:
        names = ("pixel_values", "image_grid_thw")
    patches = torch.cat([_cells(frame, MERGE) for frame in frames])
    drawn.tensors = dict(zip(names, (patches, thw), strict=True))
    return drawn


# -- Cosmos 3 and Cohere's North Vision: Qwen3-VL's parts, with features in later layers -----------


def _cosmos_omni() -> Any:
    return _qwen3(transformers.Cosmos3OmniConfig)


def _cohere_compass() -> Any:
    """Three sliding layers with rotary places, then one of full attention without places."""
    return _qwen3(
        transformers.CohereCompassConfig,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
        sliding_window=tiny.WINDOW,
        rope_parameters={"sliding_attention": ROPE, "full_attention": None},
    )


GLM = {"adjust": _gentle, "videos": True, "mixes": False}
KINDS = installed(
    {
        "PaddleOCRVL": ("paddleocr_vl", _paddleocr_vl, _row_by_row, _collate, {}),
        "Ernie4_5_VLMoe": (
            "ernie4_5_vl_moe",
            _ernie,
            _joined_frames,
            _collate_ernie,
            {"videos": True},
        ),
        "Cosmos3Edge": ("cosmos3_edge", _cosmos, _each_frame, _collate, {"videos": True}),
        "Cosmos3Omni": ("cosmos3_omni", _cosmos_omni, _picture, _collate, {"videos": True}),
        "CohereCompass": ("cohere_compass", _cohere_compass, _picture, _collate, {"videos": True}),
        "GlmOcr": ("glm_ocr", _glm_ocr, _glm_picture, _collate_glm, GLM),
    }
)
