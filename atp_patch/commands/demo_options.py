"""The command line of the demo, and the checks of its arguments before the model is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from atp_patch.commands.pruning_options import add_pruning, check_pruning
from atp_patch.contract.errors import ConfigError, InputError, first_line
from atp_patch.tools.arguments import Parser, add_model, add_output, add_weights

PROG = "python -m atp_patch.demo"
PORT = 7860


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "Ask about an image, plain and pruned, side by side; or show a web page that asks.",
        'examples/scenes/01.png "How many red shapes are there?" --overlay survivors.png',
    )
    parse.add_argument("image", type=Path, metavar="IMAGE", nargs="?", help="an image file")
    parse.add_argument("question", metavar="QUESTION", nargs="?", help="a question about it")
    add_model(parse)
    add_pruning(parse)
    add_weights(parse)
    output = add_output(parse, "everything")
    output.add_argument(
        "--overlay", type=Path, metavar="FILE", help="draw the surviving tokens: .png, .svg, .jpg"
    )
    output.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="of an answer (default: 32)"
    )
    page = parse.add_argument_group("web page")
    page.add_argument(
        "--web",
        action="store_true",
        help="show a page on this computer instead, to ask about scenes and pictures of your own",
    )
    page.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"of the page (default: {PORT})"
    )
    return parse


def check(args: argparse.Namespace) -> None:
    """Check the arguments, so that the demo does not fail only after its work is done.

    Raises:
        ATPError: if an argument is wrong; the message names it and the mend.
    """
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} must be at least 1.")
    check_pruning(args)
    if args.web:
        _check_web(args)
        return
    if args.image is None or args.question is None:
        raise InputError("give an IMAGE and a QUESTION about it, or --web.")
    if not args.question.strip():
        raise InputError("the question is empty; ask something about the image.")
    if args.overlay is not None:
        try:
            _check_overlay(args.overlay, args.image)
        except OSError as error:
            raise ConfigError(f"--overlay: {first_line(error)}; give another file.") from error


def _check_web(args: argparse.Namespace) -> None:
    from atp_patch.web import require_gradio

    if args.image is not None:
        raise ConfigError(
            "--web asks for picture and question itself; leave out IMAGE and QUESTION."
        )
    names = ("keep", "target_tokens", "weights", "overlay", "json")
    given = next((name for name in names if getattr(args, name)), None)
    if given is not None:
        option = given.replace("_", "-")
        raise ConfigError(f"--{option} goes with an IMAGE and a QUESTION, not with --web.")
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port {args.port} is not a number from 0 to {2**16 - 1}.")
    require_gradio()


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
