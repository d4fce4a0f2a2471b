"""Writes the folder of the built-in model from a training checkpoint.

`python -m workshop.export CHECKPOINT [FOLDER]` grows a shallow checkpoint to 32 layers without
changing its function and rounds the weights to bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from workshop.architecture import DECODER_LAYERS, ORIGINALS, build, grow
from workshop.processing import build_processor

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the model's state dict from a training checkpoint."""
    # A checkpoint puts the prefix "model." before the names of the state dict.
    stored = load_file(path)
    return {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}


def read_checkpoint(path: Path) -> LlavaForConditionalGeneration:
    """Read the float32 model of a training checkpoint, always with 32 decoder layers."""
    state = read_state(path)
    deepest = max(int(k.split(".")[3]) for k in state if ".language_model.layers." in k)
    model = build(deepest + 1)
    model.load_state_dict(state)
    return grow(model) if deepest + 1 == len(ORIGINALS) else model


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights (bfloat16), configuration and processor.

    Raises:
        ValueError: if the model does not have 32 decoder layers.
    """
    layers = len(model.model.language_model.layers)
    if layers != DECODER_LAYERS:
        raise ValueError(
            f"the shipped model has {DECODER_LAYERS} decoder layers, this has {layers}"
        )
    build_processor().save_pretrained(folder)
    write_model(model, folder)


def write_model(model: Any, folder: Path) -> None:
    """Write weights (bfloat16) and configuration, and make the files readable for everybody."""
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 8
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # save_pretrained leaves the weights readable by their owner only


def main(arguments: list[str] | None = None) -> None:
    """Export one checkpoint."""
    from atp_patch.builtin import builtin_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=builtin_path())
    options = parser.parse_args(arguments)
    export(read_checkpoint(options.checkpoint), options.folder)


if __name__ == "__main__":
    main()
