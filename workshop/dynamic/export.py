"""Writes the folder of the second model: `python -m workshop.dynamic.export CHECKPOINT`."""

from __future__ import annotations

import argparse
from pathlib import Path

from atp_patch.builtin import DYNAMIC, builtin_path
from workshop.dynamic.architecture import build
from workshop.dynamic.processing import save_processor
from workshop.export import read_state, write_model


def main(arguments: list[str] | None = None) -> None:
    """Export one checkpoint: weights (bfloat16), configuration and processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=builtin_path(DYNAMIC))
    options = parser.parse_args(arguments)
    model = build()
    model.load_state_dict(read_state(options.checkpoint))
    save_processor(options.folder)
    write_model(model, options.folder)


if __name__ == "__main__":
    main()
