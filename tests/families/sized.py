"""Pictures whose sizes the call tells: LightOnOCR, EXAONE 4.5, HyperCLOVA X, VideoLLaMA 3,
HunyuanOCR, Muse.

An early version of transformers may lack some of them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Paint, installed
from tests.families.mrope import VISION, _collate, _one_run
from tests.families.square import _plain_norms
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


# -- HyperCLOVA X SEED: the same tower, with a projector of its own --------------------------------


def _hyperclovax() -> Any:
    return transformers.HyperCLOVAXVisionV2Config(
        vision_config={"model_type": "qwen2_5_vl_vision", **_windowed_tower()},
        text_config=transformers.HyperCLOVAXConfig(**TEXT),
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
    )


# -- VideoLLaMA 3: patches merged or not, frames apart, tokens of later frames dropped -------------

LEFT = (24, 24, 7)  # tokens of each frame after the processor's compression


def _video_llama_3() -> Any:
    return transformers.VideoLlama3Config(
        vision_config={**TOWER, "patch_size": 4},
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
    )


def _merged_or_not(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """Images are not merged; four patches of a video make one token."""
    rows, columns = SIZES[which % 2]
    merge = 2 if which == VIDEO else 1
    frames = [paint(rows * merge * 4, columns * merge * 4) for _ in LEFT[: 3 if merge > 1 else 1]]
    cut = [_cells(frame, merge) for frame in frames]
    thw = torch.tensor([[len(frames), rows * merge, columns * merge]])
    drawn = Drawn()
    if which != VIDEO:
        drawn.square(tiny.IMAGE, 0, rows, columns)
        drawn.tensors = {"pixel_values": torch.cat(cut), "image_grid_thw": thw}
        drawn.tensors["image_merge_sizes"] = torch.tensor([merge])
        return drawn
    for frame, left in enumerate(LEFT):
        drawn.mark(tiny.FIRST_WORD + frame)
        if left == rows * columns:
            drawn.square(tiny.VIDEO, frame, rows, columns)
        else:
            drawn.square(tiny.VIDEO, frame, 1, left)
    drawn.tensors = {"pixel_values_videos": torch.cat(cut), "video_grid_thw": thw}
    drawn.tensors["video_merge_sizes"] = torch.tensor([merge])
    stays = [torch.arange(rows * columns) >= rows * columns - left for left in LEFT]
    drawn.tensors["video_compression_mask"] = torch.cat(stays)
    return drawn


def _cells(frame: Tensor, merge: int) -> Tensor:
    """(patches, values): a frame cut into cells of ``merge`` x ``merge`` patches, cell by cell."""
    size = 4
    rows = frame.unfold(1, size, size).unfold(2, size, size)  # 3, rows, columns, P, P
    _, r, c, _, _ = rows.shape
    cells = rows.reshape(3, r // merge, merge, c // merge, merge, size, size)
    return cells.permute(1, 3, 2, 4, 0, 5, 6).reshape(r * c, -1)


def _all_tensors(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    every = [picture.tensors for row in pictures for picture in row]
    names = dict.fromkeys(name for tensors in every for name in tensors)
    return {
        name: torch.cat([tensors[name] for tensors in every if name in tensors]) for name in names
    }


# -- HunyuanOCR: a newline ends each row, marks stand before and behind; all have the image's id ---


def _hunyuan_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 2, 2, 2]}
    vision = {
        **TOWER,
        "patch_size": 4,
        "max_image_size": 64,
        "out_hidden_size": tiny.HIDDEN,
        "text_hidden_size": tiny.HIDDEN,
    }
    return transformers.HunYuanVLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=tiny.IMAGE,
        image_start_token_id=tiny.VISION_START,
        image_end_token_id=tiny.VISION_END,
    )


def _newlines_and_marks(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    rows, columns = SIZES[which]
    picture = paint(rows * 8, columns * 8)
    patches = picture.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(0, 1)
    drawn = Drawn()
    drawn.mark(tiny.VISION_START, tiny.IMAGE)
    for row in range(rows):
        for column in range(columns):
            drawn.put(tiny.IMAGE, 0, 0, row, column)
        drawn.mark(tiny.IMAGE)
    drawn.mark(tiny.IMAGE, tiny.VISION_END)
    thw = torch.tensor([[1, 2 * rows, 2 * columns]])
    drawn.tensors = {"pixel_values": patches.flatten(1), "image_grid_thw": thw}
    return drawn


# -- Muse: patches row by row, frames apart; every fourth layer without places ---------------------


def _muse(make: Any, more: Any = None, **text: Any) -> Any:
    layers = (["full_attention"] + ["sliding_attention"] * 3) * 2
    vision = {
        **TOWER,
        "patch_size": 4,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "patch_temporal": 1,
        "merge_size": 2,
    }
    return make(
        text_config={**TEXT, "sliding_window": tiny.WINDOW, "layer_types": layers, **text},
        vision_config=vision,
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        out_hidden_size=128,
        projector_hidden_size=48,
        **(more or {}),
    )


AUDIO: dict[str, Any] = {
    "patch_sizes": [4],
    "hidden_sizes": [16],
    "depths": [1],
    "num_hidden_layers": 1,
    "out_hidden_size": tiny.HIDDEN,
}


def _muse_spark() -> Any:
    return _muse(
        transformers.MuseSparkConfig,
        {"audio_config": AUDIO},
        mlp_layer_types=["dense"] * 4 + ["sparse"] * 4,
        moe_intermediate_size=48,
        moe_hidden_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def _open_residuals(model: PreTrainedModel) -> None:
    """Gates that keep most of the residual: without it rounding errors grow from layer to layer."""
    _plain_norms(model)
    for name, weight in model.named_parameters():
        if name.endswith("residual_gate.gate"):
            weight -= 1.3


def _frames_apart(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    rows, columns = SIZES[which % 2]
    frames = [paint(rows * 8, columns * 8) for _ in range(3 if which == VIDEO else 1)]
    patches = torch.cat([_cells(frame, 1) for frame in frames])
    thw = torch.tensor([[len(frames), 2 * rows, 2 * columns]])
    drawn = Drawn()
    for frame in range(len(frames)):
        drawn.mark(tiny.VISION_START)
        drawn.square(tiny.VIDEO if which == VIDEO else tiny.IMAGE, frame, rows, columns)
        drawn.mark(tiny.VISION_END)
    names = ("pixel_values", "image_grid_thw")
    if which == VIDEO:
        names = ("pixel_values_videos", "video_grid_thw")
    drawn.tensors = dict(zip(names, (patches, thw), strict=True))
    return drawn


KINDS = installed(
    {
        "LightOnOcr": ("lighton_ocr", _lighton_ocr, _no_breaks, _padded_to_largest, {}),
        "HyperCLOVAXVisionV2": (
            "hyperclovax_vision_v2",
            _hyperclovax,
            _one_run,
            _without_types,
            {"videos": True},
        ),
        "VideoLlama3": (
            "video_llama_3",
            _video_llama_3,
            _merged_or_not,
            _all_tensors,
            {"videos": True},
        ),
        "HunYuanVL": ("hunyuan_vl", _hunyuan_vl, _newlines_and_marks, _collate, {}),
        "MuseGlimmer": (
            "muse_glimmer",
            lambda: _muse(transformers.MuseGlimmerConfig),
            _frames_apart,
            _all_tensors,
            {"videos": True, "adjust": _plain_norms},
        ),
        "MuseSpark": (
            "muse_spark",
            _muse_spark,
            _frames_apart,
            _all_tensors,
            {"videos": True, "adjust": _open_residuals},
        ),
        "Exaone4_5_": ("exaone4_5", _exaone4_5, _one_run, _without_types, {"videos": True}),
    }
)
