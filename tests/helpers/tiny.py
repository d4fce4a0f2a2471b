"""Tiny random vision-language models with real grids: seeded, float32, built in a moment.

Upstream's own testers put one visual token in some of their tiny inputs, so that pruning does
nothing there. These have dozens, at eight decoder layers, and weights scaled so that attention is
far from flat: a wrong key, position or mask shows in the logits.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests.helpers.copies import Template

PAD, BOS, EOS = 0, 1, 2
IMAGE, VISION_START, VISION_END, VIDEO = 5, 6, 7, 8
FIRST_WORD, VOCAB = 10, 120  # text tokens are drawn from here on

LAYERS = 8
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
WINDOW = 24  # shorter than any prompt with an image

CLIP_IMAGE, CLIP_PATCH = 48, 8
CLIP_SIDE = CLIP_IMAGE // CLIP_PATCH  # 6 x 6 = 36 visual tokens an image
QWEN_PATCH, QWEN_MERGE, QWEN_FRAMES = 4, 2, 2

LLAVA = ("llava-llama", "llava-mistral", "llava-qwen2")
QWEN = ("qwen2_vl", "qwen2_5_vl")
WINDOWED = "llava-mistral-window"
FAMILIES = ("llava-llama", "qwen2_vl")  # one of each family, where more would only repeat
ALL_KINDS = (*LLAVA, *QWEN)


def tiny_model(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    """A fresh copy of the tiny model of this kind; equal weights in every call."""
    return _built(kind, attention).copy()


def is_llava(model: PreTrainedModel) -> bool:
    """Whether the model's images are of one size (CLIP tower) rather than of any (Qwen2-VL)."""
    return model.config.model_type == "llava"


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of any family."""
    decoder = model.get_decoder()
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


@cache
def _built(kind: str, attention: str) -> Template:
    config = _config(kind)
    classes = {
        "llava": LlavaForConditionalGeneration,
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    }
    with torch.random.fork_rng():  # what a test draws does not hang on who built a model first
        model = classes[config.model_type]._from_config(config, attn_implementation=attention)
    _scale_weights(model)
    # Without an end token every generation has its full length, so that lengths never hide a fault.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    # A random model must not write image placeholders of its own.
    model.generation_config.suppress_tokens = list(range(FIRST_WORD))
    return Template(model.float().eval())


def _scale_weights(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith("bias"):
            spread, centre = 0.1, 0.0
        elif weight.dim() == 1:
            spread, centre = 0.1, 1.0  # norms, class embedding
        elif "embed" in name and "patch" not in name:
            spread, centre = 1.0, 0.0
        else:
            fan_in = weight[0].numel()
            spread, centre = _gain(name) / math.sqrt(fan_in), 0.0
        with torch.no_grad():
            weight.copy_(centre + spread * torch.randn(weight.shape, generator=generator))


def _gain(name: str) -> float:
    """Sharp attention that moves the output, and layers that do not blow rounding errors up."""
    if any(part in name for part in ("q_proj", "k_proj", "qkv")):
        return 1.1
    if any(part in name for part in ("lm_head", "v_proj", "o_proj")):
        return 1.0
    if any(part in name for part in ("projector", "merger", "vision_tower", "visual")):
        return 1.4
    return 0.5


def _config(kind: str) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 1024,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    if kind == "qwen2_vl":
        return _qwen2_vl(sizes)
    if kind == "qwen2_5_vl":
        return _qwen2_5_vl(sizes)
    text = {
        "llava-llama": lambda: LlamaConfig(**sizes),
        "llava-mistral": lambda: MistralConfig(**sizes, sliding_window=None),
        WINDOWED: lambda: MistralConfig(**sizes, sliding_window=WINDOW),
        "llava-qwen2": lambda: Qwen2Config(**sizes),
    }[kind]()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=CLIP_IMAGE,
        patch_size=CLIP_PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )


def _qwen2_vl(sizes: dict[str, int]) -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": QWEN_MERGE,
        "temporal_patch_size": QWEN_FRAMES,
    }
    return Qwen2VLConfig(text_config=_mrope(sizes), vision_config=vision, **_qwen_ids())


def _qwen2_5_vl(sizes: dict[str, int]) -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": QWEN_MERGE,
        "temporal_patch_size": QWEN_FRAMES,
        "window_size": 4 * QWEN_PATCH * QWEN_MERGE,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(text_config=_mrope(sizes), vision_config=vision, **_qwen_ids())


def _mrope(sizes: dict[str, int]) -> dict[str, object]:
    """Sections of half the head size: (time, row, column)."""
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
    assert sum(rope["mrope_section"]) == HEAD_DIM // 2
    return {**sizes, "rope_parameters": rope}


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
