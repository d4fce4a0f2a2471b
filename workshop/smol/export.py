"""Writes what ships of the third built-in model: `python -m workshop.smol.export READER BASE
FOLDER`.

The decoder is not among it, since it is fetched.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_patch.builtin.smol.loading import CONFIG, DOWN, PROJECTOR, TOWER, UP, WEIGHTS
from workshop.smol.train_tower import model_config

_DECODER = "decoder.model."
"""Beginning of the names of the decoder's additions in a checkpoint."""


def shipped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Choose from a checkpoint of `train_decoder` the weights that ship, in bfloat16."""
    found = {}
    for name, value in tensors.items():
        if name.startswith((TOWER, PROJECTOR)):
            found[name] = value
        elif name.startswith(_DECODER) and name.endswith((DOWN, UP)):
            found[name.removeprefix(_DECODER)] = value
    return {name: value.to(torch.bfloat16).contiguous() for name, value in found.items()}


def export(reader: Path, base: Path, folder: Path) -> None:
    """Write the weights and the configuration.

    Args:
        reader: a checkpoint of `train_decoder`, with a tower.
        base: folder of the decoder.
        folder: where they are written.
    """
    with safe_open(reader, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(shipped(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    config = model_config(base)
    (folder / CONFIG).write_text(config.to_json_string(use_diff=False), "utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("reader", "base", "folder"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    export(options.reader, options.base, options.folder)


if __name__ == "__main__":
    main()
