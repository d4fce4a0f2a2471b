"""Folders with models that vLLM loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from atp_patch.builtin import builtin_path


def export_llava(folder: Path) -> Path:
    """Write the built-in LLaVA as checkpoints of the Hub name its tower, which vLLM expects."""
    shutil.copytree(builtin_path("llava"), folder)
    return _renamed(folder)


def _renamed(folder: Path) -> Path:
    """Name the tensors of a CLIP or SigLIP tower in a folder as checkpoints of the Hub do."""
    file = folder / "model.safetensors"
    tower = "vision_tower."
    renamed = {
        name if "vision_model" in name else name.replace(tower, f"{tower}vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    return folder


def export_qwen2_vl(folder: Path) -> Path:
    """Write a tiny Qwen2-VL, whose pictures have any size."""
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2, **_QWEN_VISION}
    config = Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, **_ids())
    _as_qwen(folder, "Qwen2VLProcessor")
    return _saved(Qwen2VLForConditionalGeneration(config), folder)


def export_qwen2_5_vl(folder: Path) -> Path:
    """Write a tiny Qwen2.5-VL, whose tower has one block with windows and one without."""
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 128,
        "intermediate_size": 128,
        "window_size": 64,
        "fullatt_block_indexes": [1],
        **_QWEN_VISION,
    }
    config = Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, **_ids())
    _as_qwen(folder, "Qwen2_5_VLProcessor")
    return _saved(Qwen2_5_VLForConditionalGeneration(config), folder)


def export_llava_onevision(folder: Path) -> Path:
    """Write a tiny LLaVA-OneVision: a view of 36 tokens, and up to 16 tiles of as many.

    More than 9 tiles are scaled down.
    """
    vision = {**_VISION, "image_size": 48, "patch_size": 8, "vision_use_head": False}
    points = [[48, 96], [96, 48], [96, 96], [48, 192], [192, 192]]
    ids = _ids()
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(**_TEXT),
        image_grid_pinpoints=points,
        image_token_index=ids["image_token_id"],
        video_token_index=ids["video_token_id"],
        tie_word_embeddings=False,
    )
    size = {"height": 48, "width": 48}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=points),
        _tokenizer(),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
    )
    processor.save_pretrained(folder)
    _saved(LlavaOnevisionForConditionalGeneration(config), folder)
    return _renamed(folder)


def export_internvl(folder: Path) -> Path:
    """Write a tiny InternVL: up to 4 tiles of 36 tokens, and a view of the whole.

    Its placeholder is the built-in LLaVA's: vLLM reads the placeholder as a regular expression.
    """
    tokenizer = _tokenizer(
        start_image_token="<|vision_start|>",
        end_image_token="<|vision_end|>",
        context_image_token="<image>",
        video_token="<unk>",
    )
    config = InternVLConfig(
        vision_config={**_VISION, "image_size": [48, 48], "patch_size": [4, 4]},
        text_config=Qwen2Config(**_TEXT),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=36,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 48, "width": 48}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=36,
    )
    processor.save_pretrained(folder)
    return _saved(InternVLForConditionalGeneration(config), folder)


# -- what the tiny models share: the words of the built-in models, and random weights --------------

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_QWEN_VISION = {"num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen_text() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return {**_TEXT, "rope_parameters": rope}


def _ids() -> dict[str, Any]:
    """The ids of the visual tokens in the built-in vocabulary."""
    given = json.loads((builtin_path("dynamic") / "config.json").read_text())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: given[name] for name in names}


def _tokenizer(**tokens: str) -> Any:
    return AutoTokenizer.from_pretrained(builtin_path("dynamic"), **tokens)


def _as_qwen(folder: Path, processor: str) -> None:
    """Write the built-in Qwen3-VL's processor as that of an older Qwen-VL."""
    shutil.copytree(
        builtin_path("dynamic"), folder, ignore=shutil.ignore_patterns("*.safetensors", "config*")
    )
    for name in ("processor_config.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("Qwen3VLProcessor", processor))
    video = folder / "video_preprocessor_config.json"
    video.write_text(video.read_text().replace("Qwen3VLVideo", "Qwen2VLVideo"))


def _saved(model: Any, folder: Path) -> Path:
    """Write a model with random weights.

    Its attention is far from flat, so that a wrong key or position changes its answers.
    """
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        centre = float("norm" in name or "lambda" in name)
        spread = 0.1 if weight.dim() == 1 else 1.0
        if weight.dim() > 1:
            centre = 0.0
            if "embed_tokens" not in name:
                spread = 1.1 / math.sqrt(weight[0].numel())
        with torch.no_grad():
            weight.copy_(centre + spread * torch.randn(weight.shape, generator=generator))
    model.generation_config.eos_token_id = _TEXT["eos_token_id"]
    model.save_pretrained(folder)
    return folder
