"""Folders with models that vLLM loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

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
