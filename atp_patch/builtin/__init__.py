"""The small real vision-language model that ships with the package, and its generated scenes.

    from atp_patch.builtin import load_builtin, make_scene, prompt

    model, processor = load_builtin()
    scene = make_scene("test", 0)
    inputs = processor(images=scene.image, text=prompt("How many red shapes are there?"),
                       return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)

The folder `builtin_path()` also loads through `AutoProcessor` and `AutoModelForImageTextToText`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from atp_patch.builtin.processing import prompt
from atp_patch.builtin.scenes import (
    SPLITS,
    Question,
    Scene,
    SceneConfig,
    SceneObject,
    Sign,
    make_scene,
)
from atp_patch.builtin.vocabulary import TASKS

__all__ = [
    "SPLITS",
    "TASKS",
    "Question",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "Sign",
    "builtin_path",
    "load_builtin",
    "make_scene",
    "prompt",
]


def builtin_path() -> Path:
    """Folder with the weights, configuration, tokenizer, processor and card."""
    return Path(__file__).resolve().parent / "weights"


def load_builtin(
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The built-in model, in evaluation mode, and its processor.

    Args:
        dtype: of the parameters; float32 if None. They are stored in bfloat16.
        device: where the model goes.
    """
    folder = builtin_path()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    return model.to(device).eval(), processor
