"""Writes the decoder into a folder that transformers reads.

    python -m workshop.smol.decoder FOLDER

It is fetched once. Reading its file needs the package gguf.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from atp_patch.builtin.smol.base import fetch
from atp_patch.builtin.smol.loading import read_decoder


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--path", type=Path, help="the decoder's file, or the folder that holds it")
    options = parser.parse_args(arguments)
    model, tokenizer = read_decoder(fetch(path=options.path))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # transformers writes no model that was quantized, but this one is not any more.
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
