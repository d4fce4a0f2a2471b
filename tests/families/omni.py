"""Models that hear too, whose audio tokens are text to a method (Qwen2.5-Omni's and Qwen3-Omni's
thinkers), and Kimi K2.5 and Granite Docling.

An early version of transformers may lack some of them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families.kinds import TEXT, TOWER, Drawn, Paint, installed
from tests.families.more_mrope import MERGE, PATCH, _row_by_row
from tests.families.mrope import DEEP, ROPE, VISION, _collate, _one_run
from tests.families.square import SIDE, _shrunk, _tiles, _tiles_of_samples
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

AUDIO, AUDIO_START, AUDIO_END = 9, 3, 4
HEARING: dict[str, Any] = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "max_source_positions": 64,
    "output_dim": tiny.HIDDEN,
}


def _ids() -> dict[str, int]:
    audio = {
        "audio_token_id": AUDIO,
        "audio_token_index": AUDIO,
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
        "image_token_index": tiny.IMAGE,
        "video_token_index": tiny.VIDEO,
    }
    return {**tiny._qwen_ids(), **audio}


def _qwen2_5_omni() -> Any:
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={
            **VISION,
            "window_size": 4 * tiny.QWEN_PATCH * tiny.QWEN_MERGE,
            "fullatt_block_indexes": [1],
        },
        audio_config={**HEARING, "n_window": 4},
        **_ids(),
    )


def _qwen3_omni() -> Any:
    return transformers.Qwen3OmniMoeThinkerConfig(
        text_config={
            **TEXT,
            "rope_parameters": ROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
        vision_config={
            **VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1][:DEEP],
        },
        audio_config={**HEARING, "downsample_hidden_size": 16, "n_window": 4, "n_window_infer": 8},
        **_ids(),
    )


# -- Kimi K2.5: keys and values are cached as latents ----------------------------------------------


def _kimi() -> Any:
    text = {name: size for name, size in TEXT.items() if name != "head_dim"}
    text = {
        **text,
        "num_key_value_heads": tiny.HEADS,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 24,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    }
    return transformers.Kimi_K25Config(
        text_config=transformers.DeepseekV3Config(**text),
        vision_config={
            **TOWER,
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "merge_kernel_size": (MERGE, MERGE),
        },
        projection_hidden_size=TOWER["hidden_size"],
        **tiny._qwen_ids(),
    )


def _untyped(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    made = _collate(pictures, inputs)
    del made["mm_token_type_ids"]
    if "video_grid_thw" in made:
        made["video_second_per_grid"] = torch.ones(len(made["video_grid_thw"]))
    return made


# -- Granite Docling: tiles, and features added behind the first layers ----------------------------


def _granite_docling() -> Any:
    return transformers.GraniteDoclingConfig(
        text_config={
            **{name: size for name, size in TEXT.items() if name != "head_dim"},
            "embedding_multiplier": 2.0,
            "attention_multiplier": tiny.HEAD_DIM**-0.5,
            "logits_scaling": 1.0,
        },
        vision_config={
            **TOWER,
            "image_size": 48,
            "patch_size": 4,
            "scale_factor": 2,
            "out_hidden_size": tiny.HIDDEN,
            "deepstack_visual_indexes": [0, 1],
            "use_fine_route": False,
        },
        image_token_id=tiny.IMAGE,
        pad_token_id=tiny.PAD,
    )


def _marked_tiles(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    whole = _shrunk(paint(48, 96), 48) if which else paint(48, 48)[None]
    tiles = torch.cat([_tiles(paint(48, 96), 48), whole]) if which else whole
    drawn = Drawn(tensors={"pixel_values": tiles})
    for tile in range(len(tiles)):
        drawn.mark(tiny.VISION_START, AUDIO)  # <fake_token_around_image><row_1_col_1>
        drawn.square(tiny.IMAGE, tile, SIDE, SIDE)
    drawn.mark(tiny.VISION_START)
    return drawn


def _whole_tiles(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """The mask says which tiles are pictures, and not which pixels."""
    made = _tiles_of_samples(pictures, inputs)
    if made:
        made["pixel_attention_mask"] = made["pixel_attention_mask"].flatten(2).any(-1)
    return made


VIDEOS = {"videos": True}
KINDS = installed(
    {
        "Qwen2_5OmniThinker": (
            "qwen2_5_omni",
            _qwen2_5_omni,
            _one_run,
            _untyped,
            VIDEOS,
        ),
        "Qwen3OmniMoeThinker": (
            "qwen3_omni_moe",
            _qwen3_omni,
            _one_run,
            _untyped,
            VIDEOS,
        ),
        "Kimi_K25": ("kimi_k25", _kimi, _row_by_row, _untyped, {}),
        "GraniteDocling": ("granite_docling", _granite_docling, _marked_tiles, _whole_tiles, {}),
    }
)
