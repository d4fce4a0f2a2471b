"""The command line of the demo, and the checks of its arguments before the model is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from PIL import Image

from atp_patch.builtin import NAMES
from atp_patch.contract.errors import ConfigError, InputError
from atp_patch.methods import untrained_methods
from atp_patch.tools.command_line import OneLineParser, comma_separated, seed
from atp_patch.tools.loading import DTYPES, first_line
from atp_patch.tools.trained import find_trained, shipped

PROG = "python -m atp_patch.demo"
DEFAULT_BUDGET = "a quarter of the image's"


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parse = OneLineParser(
        prog=PROG, description="Ask about an image, plain and pruned, side by side."
    )
    add = parse.add_argument
    add("image", type=Path, metavar="IMAGE", help="an image file")
    add("question", metavar="QUESTION", help="a question about it")
    add(
        "--model",
        help=f"{' (default), '.join(NAMES)}, or folder or Hub id of a checkpoint",
    )
    add("--method", choices=untrained_methods(), help="how to choose tokens (default: atp)")
    add(
        "--layers",
        type=comma_separated(int),
        metavar="I[,J..]",
        help="prune before these decoder layers (default: 4,14,24 of 32, in proportion)",
    )
    add(
        "--target-tokens",
        type=float,
        metavar="N",
        help=f"visual tokens averaged over all decoder layers (default: {DEFAULT_BUDGET})",
    )
    add(
        "--keep",
        type=comma_separated(float),
        metavar="P[,Q..]",
        help="instead: the share that a pruning layer keeps, one number or one for each layer",
    )
    add(
        "--weights",
        metavar="ADAPTER",
        help="folder or Hub id of a saved adapter, folder of a training, or an adapter of the "
        f"built-in model: {', '.join(shipped())}",
    )
    add("--max-new-tokens", type=int, default=32, metavar="N", help="default: 32")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=sorted(DTYPES), help="default: float32 on a CPU, else bfloat16")
    add("--overlay", type=Path, metavar="FILE.png", help="draw the surviving tokens")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--seed", type=seed, default=0, help="seed of what is random, such as --method random")
    return parse


def check(args: argparse.Namespace) -> None:
    """Check the arguments, so that the demo does not fail only after its work is done.

    Raises:
        ATPError: if an argument is wrong; the message names it and the mend.
    """
    if not args.question.strip():
        raise InputError("the question is empty; ask something about the image.")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} must be at least 1.")
    if args.keep is not None and args.target_tokens is not None:
        raise ConfigError("--keep and --target-tokens both set the budget; give one of them.")
    if args.overlay is not None:
        try:
            _check_overlay(args.overlay, args.image)
        except OSError as error:
            raise ConfigError(f"--overlay: {first_line(error)}; give another file.") from error


def patch_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of ``patch_model``."""
    settings = {
        "layers": args.layers,
        "method": args.method,
        "keep": args.keep[0] if args.keep is not None and len(args.keep) == 1 else args.keep,
        "target_tokens": args.target_tokens,
        "weights": args.weights and find_trained(args.weights).adapter,
    }
    return settings | ({"seed": args.seed} if args.method == "random" else {})


def _check_overlay(path: Path, image: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--overlay {path} is a folder; give the path of a file to write.")
    if not path.parent.is_dir():
        raise ConfigError(f"--overlay {path}: there is no folder {path.parent}; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--overlay {path} may not be written; give another file.")
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--overlay {path}: {path.suffix!r} is no image format; give FILE.png.")
    if path.exists() and image.exists() and path.samefile(image):
        raise ConfigError(f"--overlay {path} would overwrite the image; give another file.")
