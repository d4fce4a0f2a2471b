"""Pictures whose sizes the call tells, with positions that count tokens: LightOnOCR, EXAONE 4.5.

An early version of transformers may lack some of them.
"""

from __future__ import annotations

from typing import Any

import transformers

from tests.families.kinds import TEXT, Drawn, Paint, installed
from tests.families.mrope import VISION, _collate, _one_run
from tests.families.towers import _padded_to_largest, _pixtral_tower
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

SIZES = ((4, 6), (5, 7))


def _lighton_ocr() -> Any:
    return transformers.LightOnOcrConfig(
        vision_config=_pixtral_tower(),
        text_config=transformers.Qwen3Config(**TEXT),
        image_token_id=tiny.IMAGE,
        spatial_merge_size=2,
    )


def _no_breaks(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    cell = 4 * config.spatial_merge_size
    rows, columns = SIZES[which]
    size = rows * cell, columns * cell
    drawn = Drawn(tensors={"pixels": paint(*size), "size": size})
    drawn.square(tiny.IMAGE, 0, rows, columns)
    return drawn


def _windowed_tower() -> dict[str, Any]:
    """Qwen2.5-VL's tower."""
    return {
        **VISION,
        "window_size": 4 * tiny.QWEN_PATCH * tiny.QWEN_MERGE,
        "fullatt_block_indexes": [1],
    }


def _exaone4_5() -> Any:
    """Three sliding layers, then one of full attention without positions."""
    layers = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    text = transformers.Exaone4Config(**TEXT, sliding_window=tiny.WINDOW, layer_types=layers)
    return transformers.Exaone4_5_Config(
        vision_config={**_windowed_tower(), "num_key_value_heads": 1},
        text_config=text,
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
    )


def _without_types(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    made = _collate(pictures, inputs)
    del made["mm_token_type_ids"]
    return made


KINDS = installed(
    {
        "LightOnOcr": ("lighton_ocr", _lighton_ocr, _no_breaks, _padded_to_largest, {}),
        "Exaone4_5_": ("exaone4_5", _exaone4_5, _one_run, _without_types, {"videos": True}),
    }
)
