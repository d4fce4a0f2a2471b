"""Decoders some of whose layers keep a state in place of keys: Qwen 3.5, LFM2, LFM3, MiniCPM-V."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, cache_utils

from tests.families.hosts import HOST, NEWEST
from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Kind, Paint, installed
from tests.families.mrope import FRAMES, ROPE, VISION, _collate, _picture
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

SIZES = ((4, 6), (5, 7), (3, 4))  # rows and columns of visual tokens; the last of a video's frames
WHOLE = (3, 4)  # and of the small view of a picture that is cut
OPEN, CLOSE, BEGIN, END, NEWLINE = 6, 7, 8, 9, 4
CELL, PATCH = 2, 4


def _types(state: str, **attending: str) -> list[str]:
    """The types of all layers; names like ``at_3`` say which attend."""
    types = [state] * tiny.LAYERS
    for name, kind in attending.items():
        types[int(name.removeprefix("at_"))] = f"{kind}_attention"
    return types


QWEN = _types("linear_attention", at_1="full", at_4="full", at_7="full")
LFM2 = _types("conv", at_1="full", at_4="full", at_6="full")  # the last layer keeps a state
LFM3 = _types("conv", at_1="sliding", at_3="full", at_5="sliding", at_6="full")


# -- Qwen 3.5 --------------------------------------------------------------------------------------


def _qwen_text(**more: Any) -> dict[str, Any]:
    return {
        **TEXT,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
        "partial_rotary_factor": 1.0,
        "layer_types": QWEN,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        **more,
    }


def _qwen3_5(prefix: str, **text: Any) -> Any:
    make = getattr(transformers, f"{prefix}Config")
    vision = {**VISION, "num_position_embeddings": 64}
    return make(text_config=_qwen_text(**text), vision_config=vision, **tiny._qwen_ids())


def _remembering(model: PreTrainedModel) -> None:
    """Norms that multiply by one more than their weight, and states that fade slowly."""
    for name, weight in model.get_decoder().named_parameters():
        if "norm" in name and "linear_attn.norm" not in name:
            weight -= 1
        elif "A_log" in name:
            weight -= 4
        elif "conv1d" in name:
            weight *= 4


def _gentle(model: PreTrainedModel) -> None:
    """Sandwich norms would blow up rounding errors, of the plain model too."""
    for name, weight in model.get_decoder().named_parameters():
        if "post_operator_norm" in name or "post_ffn_norm" in name:
            weight *= 0.5


# -- LFM2-VL: tiles of any size, each behind a mark ------------------------------------------------


def _lfm2_vl() -> Any:
    vision = {
        **TOWER,
        "model_type": "siglip2_vision_model",
        "patch_size": PATCH,
        "num_patches": 64,
        "vision_use_head": False,
    }
    text = {**TEXT, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3, "layer_types": LFM2}
    return transformers.Lfm2VlConfig(
        vision_config=vision,
        text_config={**text, "model_type": "lfm2"},
        image_token_id=tiny.IMAGE,
        projector_hidden_size=48,
        downsample_factor=CELL,
    )


def _lfm2_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """A small picture is one tile; a larger one is two, and a small view of the whole."""
    tiles = [SIZES[0]] if which == 0 else [SIZES[1], SIZES[1], WHOLE]
    drawn = Drawn(tensors={"tiles": []})
    drawn.mark(OPEN)
    for number, (height, width) in enumerate(tiles):
        if len(tiles) > 1:
            drawn.mark(BEGIN)
        drawn.square(tiny.IMAGE, number, height, width)
        drawn.tensors["tiles"].append(paint(height * CELL * PATCH, width * CELL * PATCH))
    drawn.mark(CLOSE)
    return drawn


def _naflex(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """Patches of each tile row by row, filled up to the largest; their mask and their sizes."""
    tiles = [tile for row in pictures for picture in row for tile in picture.tensors["tiles"]]
    if not tiles:
        return {}
    rows = [_patches(tile) for tile in tiles]
    most = max(len(patches) for patches in rows)
    values = torch.zeros(len(rows), most, rows[0].shape[1])
    mask = torch.zeros(len(rows), most, dtype=torch.long)
    for number, patches in enumerate(rows):
        values[number, : len(patches)], mask[number, : len(patches)] = patches, 1
    sizes = torch.tensor([[tile.shape[1] // PATCH, tile.shape[2] // PATCH] for tile in tiles])
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": sizes}


def _patches(tile: Tensor) -> Tensor:
    """(patches, values) of a picture (3, height, width), row by row, channels last."""
    cut = tile.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # 3, rows, columns, P, P
    return cut.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


# -- LFM3-VL: pictures of any size, whose positions count tokens -----------------------------------


def _lfm3_vl() -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["conv", "full_attention"],
        "patch_size": PATCH,
        "spatial_merge_size": CELL,
        "temporal_patch_size": 2,
    }
    text = {**TEXT, "conv_L_cache": 3, "layer_types": LFM3, "sliding_window": tiny.WINDOW}
    return transformers.Lfm3VlConfig(
        vision_config=vision,
        text_config={**text, "model_type": "lfm3"},
        projector_hidden_size=48,
        **tiny._qwen_ids(),
    )


def _without_types(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    made = _collate(pictures, inputs)
    del made["mm_token_type_ids"]
    return made


# -- MiniCPM-V: the whole picture, then slices of it between marks ---------------------------------


def _minicpm(prefix: str, **more: Any) -> Any:
    vision = {**TOWER, "image_size": 16 * PATCH, "patch_size": PATCH, "insert_layer_id": 0}
    return getattr(transformers, f"{prefix}Config")(
        vision_config=vision,
        text_config={**_qwen_text(), "model_type": "qwen3_5_text"},
        image_token_id=tiny.IMAGE,
        video_token_id=3,
        insert_layer_id=0,
        **more,
    )


def _sliced(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    side = (2 if config.downsample_mode == "4x" else 4) * PATCH
    token = config.video_token_id if which == VIDEO else tiny.IMAGE
    drawn = Drawn(tensors={"video": which == VIDEO, "crops": []})

    def crop(size: tuple[int, int], first: int, last: int) -> None:
        drawn.mark(first)
        drawn.square(token, len(drawn.tensors["crops"]), *size)
        drawn.mark(last)
        drawn.tensors["crops"].append(paint(size[0] * side, size[1] * side))

    if which == VIDEO:
        for _ in range(FRAMES):
            crop(SIZES[VIDEO], OPEN, CLOSE)
    elif which == 0:
        crop(SIZES[0], OPEN, CLOSE)
    else:
        crop(WHOLE, OPEN, CLOSE)
        crop(SIZES[1], BEGIN, END)
        crop(SIZES[1], BEGIN, END)
    return drawn


def _navit(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """Patches of all crops side by side, (1, 3, P, patches x P); images and videos apart."""
    made: Inputs = {}
    for video, name in ((False, ""), (True, "_videos")):
        every = [picture.tensors for row in pictures for picture in row]
        crops = [
            crop for tensors in every if tensors["video"] == video for crop in tensors["crops"]
        ]
        if crops:
            strips = [
                crop.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(0, 3, 1, 2, 4)
                for crop in crops
            ]
            made[f"pixel_values{name}"] = torch.cat([strip.flatten(2) for strip in strips], 2)[None]
            made[f"target_sizes{name}"] = torch.tensor(
                [[crop.shape[1] // PATCH, crop.shape[2] // PATCH] for crop in crops],
                dtype=torch.int32,
            )
    return made


def _on_a_canvas(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    types = (ids == tiny.IMAGE).long() + 2 * (ids == 3).long()
    return {**_navit(pictures, inputs), "mm_token_type_ids": types}


MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
LINEAR: dict[str, Any] = {"videos": True, "adjust": _remembering, "default_layers": (2, 5)}
MARKS = {
    "image_start_id": OPEN,
    "image_end_id": CLOSE,
    "slice_start_id": BEGIN,
    "slice_end_id": END,
    "newline_id": NEWLINE,
}
_ALL = installed(
    {
        "Qwen3_5": ("qwen3_5", lambda: _qwen3_5("Qwen3_5"), _picture, _collate, LINEAR),
        "Qwen3_5Moe": (
            "qwen3_5_moe",
            lambda: _qwen3_5("Qwen3_5Moe", **MOE),
            _picture,
            _collate,
            LINEAR,
        ),
        "Lfm2Vl": ("lfm2_vl", _lfm2_vl, _lfm2_picture, _naflex, {"default_layers": (2, 5, 7)}),
        "Lfm3Vl": (
            "lfm3_vl",
            _lfm3_vl,
            _picture,
            _without_types,
            {"videos": True, "adjust": _gentle, "default_layers": (2, 4, 6)},
        ),
        "MiniCPMV4_6": ("minicpmv4_6", lambda: _minicpm("MiniCPMV4_6"), _sliced, _navit, LINEAR),
        "MiniCPMV4_7": (
            "minicpmv4_7",
            lambda: _minicpm("MiniCPMV4_7", **MARKS),
            _sliced,
            _on_a_canvas,
            LINEAR,
        ),
        "MiniCPMOcr": ("minicpm_ocr", lambda: _minicpm("MiniCPMOcr"), _sliced, _navit, LINEAR),
    }
)
# Version 5.4 holds states in caches of their own, and the first MiniCPM-V took crops of one size.
_STATES = hasattr(cache_utils, "LinearAttentionCacheLayerMixin")
KINDS = tuple(
    kind for kind in _ALL if _STATES and not (kind.name.startswith("minicpm") and HOST < NEWEST)
)
ROTARY_PLACES = tuple(kind for kind in KINDS if kind.name.startswith("qwen"))


def counts_tokens(kind: Kind) -> bool:
    """Whether the position ids of the kind's decoder number the tokens."""
    return kind.name in ("lfm2_vl", "lfm3_vl", "minicpmv4_6", "minicpm_ocr")


def slides(kind: Kind) -> bool:
    """Whether some layers of the kind's decoder have a sliding window."""
    return kind.name == "lfm3_vl"
