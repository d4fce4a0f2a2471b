"""The command line of the demo, and the checks of its arguments before the model is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_patch.contract.errors import ConfigError, InputError, first_line
from atp_patch.tools.arguments import (
    Parser,
    add_layers,
    add_model,
    add_output,
    add_seed,
    add_target_tokens,
    add_weights,
    comma_separated,
    hub_options,
)

if TYPE_CHECKING:
    from atp_patch.tools.trained import Trained

PROG = "python -m atp_patch.demo"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "Ask about an image, plain and pruned, side by side.",
        'examples/scenes/01.png "How many red shapes are there?" --overlay survivors.png',
    )
    parse.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parse.add_argument("question", metavar="QUESTION", help="a question about it")
    add_model(parse)
    pruning = parse.add_argument_group("pruning")
    pruning.add_argument(
        "--method",
        metavar="NAME",
        help="how to choose tokens (default: atp); docs/methods.md lists the names",
    )
    add_layers(pruning)
    add_target_tokens(pruning)
    pruning.add_argument(
        "--keep",
        type=comma_separated(float),
        metavar="P[,Q..]",
        help="instead: the share that a pruning layer keeps, one number or one for each layer",
    )
    add_seed(pruning, "what is random, such as --method random")
    add_weights(parse)
    output = add_output(parse, "everything")
    output.add_argument(
        "--overlay", type=Path, metavar="FILE", help="draw the surviving tokens: .png, .svg, .jpg"
    )
    output.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="of an answer (default: 32)"
    )
    return parse


def check(args: argparse.Namespace) -> None:
    """Check the arguments, so that the demo does not fail only after its work is done.

    Raises:
        ATPError: if an argument is wrong; the message names it and the mend.
    """
    from atp_patch.methods import untrained_methods

    if not args.question.strip():
        raise InputError("the question is empty; ask something about the image.")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} must be at least 1.")
    if args.method is not None and args.method not in untrained_methods():
        raise ConfigError(
            f"--method {args.method!r}: give one of {', '.join(untrained_methods())}; one that has "
            "to be trained comes with --weights."
        )
    if args.keep is not None and args.target_tokens is not None:
        raise ConfigError("--keep and --target-tokens both set the budget; give one of them.")
    if args.overlay is not None:
        try:
            _check_overlay(args.overlay, args.image)
        except OSError as error:
            raise ConfigError(f"--overlay: {first_line(error)}; give another file.") from error


def trained(args: argparse.Namespace) -> Trained | None:
    """Find the adapter that ``--weights`` names, which is downloaded if it is on the Hub.

    Raises:
        ATPError: if there is none.
    """
    from atp_patch.tools.trained import find_trained

    hub = hub_options(args)
    if args.weights is None and (given := next((n for n, value in hub.items() if value), None)):
        raise ConfigError(f"--{given.replace('_', '-')} goes with --weights.")
    return None if args.weights is None else find_trained(args.weights, **hub)


def patch_settings(args: argparse.Namespace, found: Trained | None) -> dict[str, Any]:
    """Return the keyword arguments of ``patch_model``.

    Args:
        args: the arguments.
        found: what :func:`trained` has found.
    """
    settings = {
        "layers": args.layers,
        "method": args.method,
        "keep": args.keep[0] if args.keep is not None and len(args.keep) == 1 else args.keep,
        "target_tokens": args.target_tokens,
        "weights": None if found is None else found.adapter,
    }
    return settings | ({"seed": args.seed} if args.method == "random" else {})


def _check_overlay(path: Path, image: Path) -> None:
    from PIL import Image

    from atp_patch.visualize.canvas import require_matplotlib

    require_matplotlib()
    if path.is_dir():
        raise ConfigError(f"--overlay {path} is a folder; give the path of a file to write.")
    if not path.parent.is_dir():
        raise ConfigError(f"--overlay {path}: there is no folder {path.parent}; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--overlay {path} may not be written; give another file.")
    if path.suffix.lower() not in {".svg", *Image.registered_extensions()}:
        raise ConfigError(f"--overlay {path}: {path.suffix!r} is no image format; give FILE.png.")
    if path.exists() and image.exists() and path.samefile(image):
        raise ConfigError(f"--overlay {path} would overwrite the image; give another file.")
