"""Short trainings of the small model, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from atp_patch.training.command import train
from atp_patch.training.encode import Encoder
from atp_patch.training.records import Scenes
from atp_patch.training.settings import read_settings

LAYERS = [2, 4, 6]


def run(folder: Path, out: Path, resume: bool = False, **changes: Any) -> Path:
    flags = {
        "model": str(folder),
        "out": str(out),
        "layers": LAYERS,
        "target_tokens": 12,
        "samples": 40,
        "steps": 4,
        "batch_size": 4,
        "atp_lr": 1e-2,
        "device": "cpu",
        "log_every": 1,
        "save_every": 2,
        "keep": 9,
        "calibrate": 0,
        **changes,
    }
    options = {"reference_grid": 6, "heads_hidden_size": 8, "lambda_atp": 0.05}
    options |= flags.pop("options", {})
    if "adapter" not in flags:
        flags["options"] = options
    return train(read_settings(None, {k: v for k, v in flags.items() if v is not None}), resume)


def history(out: Path) -> list[dict[str, float]]:
    """Lines of the log, as the Trainer saved them."""
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "next_token" in entry]


def heads(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "atp_model.safetensors")


def plain(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def question(folder: Path, number: int = 0) -> dict[str, Tensor]:
    encode = Encoder(AutoProcessor.from_pretrained(folder), [4], None)
    return encode(Scenes(99)[number])
