"""Folders with models that vLLM loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from atp_patch.builtin import builtin_path


def export_llava(folder: Path) -> Path:
    """Write the built-in LLaVA as checkpoints of the Hub name its tower, which vLLM expects."""
    shutil.copytree(builtin_path("llava"), folder)
    tensors = load_file(folder / "model.safetensors")
    tower = "vision_tower."
    renamed = {
        name if "vision_model" in name else name.replace(tower, f"{tower}vision_model."): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def export_qwen2_vl(folder: Path) -> Path:
    """Write a tiny Qwen2-VL with random weights, and with the words of the built-in models.

    Its attention is far from flat, so that a wrong key or position changes its answers.
    """
    shutil.copytree(builtin_path("dynamic"), folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("Qwen3VLProcessor", "Qwen2VLProcessor"))
    video = folder / "video_preprocessor_config.json"
    video.write_text(video.read_text().replace("Qwen3VLVideo", "Qwen2VLVideo"))
    given = json.loads((folder / "config.json").read_text())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = {
        "vocab_size": given["text_config"]["vocab_size"],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6],
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 128,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    ids = {name: given[name] for name in names}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Qwen2VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        spread, centre = (0.1, float("norm" in name)) if weight.dim() == 1 else (1.0, 0.0)
        if weight.dim() > 1 and "embed_tokens" not in name:
            spread = 1.1 / math.sqrt(weight[0].numel())
        with torch.no_grad():
            weight.copy_(centre + spread * torch.randn(weight.shape, generator=generator))
    model.generation_config.eos_token_id = text["eos_token_id"]
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder
