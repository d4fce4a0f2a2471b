"""Writes the second model's folder: `python -m atp_patch.builtin.dynamic.export CHECKPOINT`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from atp_patch.builtin import DYNAMIC, builtin_path
from atp_patch.builtin.dynamic.architecture import build
from atp_patch.builtin.dynamic.processing import save_processor


def main(arguments: list[str] | None = None) -> None:
    """Export one checkpoint: weights (bfloat16), configuration and processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=builtin_path(DYNAMIC))
    options = parser.parse_args(arguments)
    stored = load_file(options.checkpoint)
    model = build()
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
    )
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 8
    model.to(torch.bfloat16).save_pretrained(options.folder)
    save_processor(options.folder)
    for file in options.folder.iterdir():
        file.chmod(0o644)  # save_pretrained leaves the weights readable by their owner only


if __name__ == "__main__":
    main()
