"""More families whose images or tiles are squares: Aya Vision, Command A Vision, GOT-OCR 2,
DeepSeek-VL, Janus, Qianfan-OCR, Step 3.7.

An early version of transformers may lack some of them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import Cohere2Config, LlamaConfig, Qwen2Config, Qwen3Config

from tests.families.kinds import TEXT, TOWER, Drawn, Paint, installed, stacked
from tests.families.square import SIDE, _internvl_picture, _plain_norms, _shrunk, _tiles
from tests.helpers import tiny

TILE = 48
OPEN, CLOSE, MARK = 6, 7, 9
SIGLIP: dict[str, Any] = {
    **TOWER,
    "model_type": "siglip_vision_model",
    "image_size": TILE,
    "vision_use_head": False,
}


def _cohere2() -> Cohere2Config:
    """Three sliding layers, then one of full attention without positions."""
    return Cohere2Config(**TEXT, sliding_window=tiny.WINDOW)


# -- Aya Vision and Command A Vision: tiles behind marks, then the whole ---------------------------


def _aya_vision() -> Any:
    return transformers.AyaVisionConfig(
        vision_config={**SIGLIP, "patch_size": 4},
        text_config=_cohere2(),
        image_token_index=tiny.IMAGE,
        downsample_factor=2,
    )


def _cohere2_vision() -> Any:
    return transformers.Cohere2VisionConfig(
        vision_config={**SIGLIP, "patch_size": 4},
        text_config=_cohere2(),
        image_token_id=tiny.IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=96,
    )


def _marked_tiles(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """A mark before each tile; a wide picture has two, and then the whole of it."""
    tiles = _tiles(paint(TILE, TILE * (1 + which)), TILE)
    if which:
        tiles = torch.cat([tiles, _shrunk(paint(TILE, 2 * TILE), TILE)])
    drawn = Drawn(tensors={"pixel_values": tiles})
    drawn.mark(OPEN)
    for tile in range(len(tiles)):
        drawn.mark(MARK)
        drawn.square(tiny.IMAGE, tile, SIDE, SIDE)
    drawn.mark(CLOSE)
    return drawn


# -- GOT-OCR 2: crops in one run; two convolutions make one token of 4 x 4 patches -----------------


def _got_ocr2() -> Any:
    vision = {
        "hidden_size": 32,
        "mlp_dim": 48,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 2 * TILE,
        "patch_size": 4,
        "window_size": 0,
        "global_attn_indexes": [1],
    }
    return transformers.GotOcr2Config(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_index=tiny.IMAGE,
        image_seq_length=SIDE**2,
    )


def _crops(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """One crop, or two of one picture."""
    size = 2 * TILE
    crops = _tiles(paint(size, size * (1 + which)), size)
    drawn = Drawn(tensors={"pixel_values": crops})
    drawn.mark(OPEN)
    for crop in range(len(crops)):
        drawn.square(tiny.IMAGE, crop, SIDE, SIDE)
    drawn.mark(CLOSE)
    return drawn


# -- DeepSeek-VL and Janus: one square a picture ---------------------------------------------------


def _deepseek_vl() -> Any:
    return transformers.DeepseekVLConfig(
        vision_config={**SIGLIP, "patch_size": 8},
        text_config=LlamaConfig(**TEXT),
        image_token_id=tiny.IMAGE,
    )


def _deepseek_vl_hybrid() -> Any:
    """Beside the small picture a large one, for a tower like SAM's."""
    sam = {
        "hidden_size": 32,
        "mlp_dim": 48,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 2 * TILE,
        "patch_size": 8,
        "window_size": 0,
        "global_attn_indexes": [0],
    }
    return transformers.DeepseekVLHybridConfig(
        vision_config={**SIGLIP, "patch_size": 8},
        high_res_vision_config={"model_type": "sam_vision_model", **sam},
        text_config=LlamaConfig(**TEXT),
        image_token_id=tiny.IMAGE,
    )


def _janus() -> Any:
    vision = {
        "hidden_size": 32,
        "mlp_ratio": 1.5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 8,
        "projection_dim": tiny.HIDDEN,
        "num_image_tokens": SIDE**2,
    }
    drawing = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": 16,
        "image_token_embed_dim": tiny.HIDDEN,
    }
    return transformers.JanusConfig(
        vision_config=vision,
        vq_config=drawing,
        text_config=LlamaConfig(**TEXT),
        image_token_id=tiny.IMAGE,
    )


def _one_square(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    drawn = Drawn(tensors={"pixel_values": paint(TILE, TILE)[None]})
    drawn.mark(OPEN)
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    drawn.mark(CLOSE)
    return drawn


def _two_sizes(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    drawn = _one_square(config, which, paint, count)
    small = drawn.tensors["pixel_values"]
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
    drawn.tensors["high_res_pixel_values"] = large
    return drawn


# -- Qianfan-OCR: InternVL's tiles -----------------------------------------------------------------


def _qianfan_ocr() -> Any:
    return transformers.QianfanOCRConfig(
        vision_config={**TOWER, "image_size": [TILE, TILE], "patch_size": [4, 4]},
        text_config=Qwen3Config(**TEXT),
        image_token_id=tiny.IMAGE,
        downsample_ratio=0.5,
    )


def _both(pictures: list[list[Drawn]], inputs: Any) -> Any:
    names = ("pixel_values", "high_res_pixel_values")
    return {key: value for name in names for key, value in stacked(name)(pictures, inputs).items()}


# -- Step 3.7: small crops between marks, then the whole, which is larger --------------------------


def _step3p7() -> Any:
    """Layers of full attention and sliding ones, which have heads of their own number."""
    rope = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 10000.0), ("sliding_attention", 1000.0))
    }
    text = {
        **TEXT,
        "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 2,
        "sliding_window": tiny.WINDOW,
        "num_sliding_attention_heads": 2 * tiny.HEADS,
        "rope_parameters": rope,
        "moe_layers_enum": "4,5,6,7",
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "share_expert_dim": 48,
    }
    vision = {
        "hidden_size": 32,
        "mlp_ratio": 1.5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 2 * TILE,
        "patch_size": 4,
    }
    return transformers.Step3p7Config(
        vision_config=vision, text_config=text, image_token_id=tiny.IMAGE
    )


def _small_and_large(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """The whole picture; before it, where it is wide, its two halves in fewer pixels."""
    wide = paint(64, 64 * (1 + which))
    drawn = Drawn(tensors={"pixel_values": _shrunk(wide, 2 * TILE)})
    if which:
        drawn.tensors["pixel_values_local"] = _tiles(wide, 64)
        for crop in range(2):
            drawn.mark(OPEN)
            drawn.square(tiny.IMAGE, crop, 4, 4)
            drawn.mark(CLOSE)
    drawn.mark(OPEN)
    drawn.square(tiny.IMAGE, 2 * which, SIDE, SIDE)
    drawn.mark(CLOSE)
    return drawn


def _counted(pictures: list[list[Drawn]], inputs: Any) -> Any:
    every = [one.tensors for row in pictures for one in row]
    made = {
        name: torch.cat([one[name] for one in every if name in one])
        for name in ("pixel_values", "pixel_values_local")
        if any(name in one for one in every)
    }
    counts = [len(one.get("pixel_values_local", ())) for one in every]
    return {**made, "num_local_patches": counts} if every else {}


PIXELS = stacked("pixel_values")
KINDS = installed(
    {
        "AyaVision": ("aya_vision", _aya_vision, _marked_tiles, PIXELS, {}),
        "Cohere2Vision": ("cohere2_vision", _cohere2_vision, _marked_tiles, PIXELS, {}),
        "GotOcr2": ("got_ocr2", _got_ocr2, _crops, PIXELS, {"attention": "eager", "placed": False}),
        "DeepseekVL": ("deepseek_vl", _deepseek_vl, _one_square, PIXELS, {}),
        "DeepseekVLHybrid": (
            "deepseek_vl_hybrid",
            _deepseek_vl_hybrid,
            _two_sizes,
            _both,
            {"placed": False},
        ),
        "Janus": ("janus", _janus, _one_square, PIXELS, {}),
        "Step3p7": (
            "step3p7",
            _step3p7,
            _small_and_large,
            _counted,
            {"placed": False, "adjust": _plain_norms},
        ),
        "QianfanOCR": ("qianfan_ocr", _qianfan_ocr, _internvl_picture, PIXELS, {}),
    }
)
