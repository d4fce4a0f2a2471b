"""More families whose rotary positions carry the places of pictures: PaddleOCR-VL, GLM-OCR.

An early version of transformers may lack some of them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families.kinds import TEXT, TOWER, Drawn, Paint, installed
from tests.families.mrope import ROPE, _collate, _collate_glm, _gentle, _glm, _glm_picture
from tests.helpers import tiny

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


GLM = {"adjust": _gentle, "videos": True, "mixes": False}
KINDS = installed(
    {
        "PaddleOCRVL": ("paddleocr_vl", _paddleocr_vl, _row_by_row, _collate, {}),
        "GlmOcr": ("glm_ocr", _glm_ocr, _glm_picture, _collate_glm, GLM),
    }
)
