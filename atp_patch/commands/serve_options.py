"""The command line of the server, and the checks of its arguments before the model is loaded."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from atp_patch.builtin import NAMES
from atp_patch.commands.pruning_options import add_pruning, check_pruning
from atp_patch.contract.errors import ConfigError
from atp_patch.tools.arguments import (
    MAX_IMAGE_PIXELS,
    Parser,
    add_model,
    add_output,
    add_weights,
)

PROG = "atp-patch serve"
PLAIN = "plain"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "Serve one patched model over HTTP, with the server of transformers: chat completions of\n"
        "OpenAI's API with pictures, whole or streamed. --method plain leaves the model unpatched.",
        "--model llava-hf/llava-1.5-7b-hf --target-tokens 144 --port 8000",
    )
    add_model(parse).set_defaults(model=next(iter(NAMES)))
    add_pruning(parse)
    add_weights(parse)
    server = parse.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="the address (default: 127.0.0.1)"
    )
    server.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: any free one (default: 8000)"
    )
    server.add_argument(
        "--max-image-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help=f"larger pictures are refused (default: {MAX_IMAGE_PIXELS})",
    )
    server.add_argument("--continuous-batching", action=_Refused, nargs=0, help=argparse.SUPPRESS)
    add_output(parse, "the address and what is served")
    return parse


class _Refused(argparse.Action):
    """The option of ``transformers serve`` for which there is no way with pictures."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(
            "--continuous-batching: the continuous batching of transformers takes no pictures, so "
            "there is nothing to prune; leave it out"
        )


def check(args: argparse.Namespace) -> None:
    """Check the arguments before the model is loaded.

    Raises:
        ConfigError: if one is wrong; the message names it and the mend.
    """
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port {args.port} must be from 0 to 65535.")
    if args.max_image_pixels < 1:
        raise ConfigError(f"--max-image-pixels {args.max_image_pixels} must be at least 1.")
    if args.method != PLAIN:
        check_pruning(args)
        return
    for name in ("layers", "target_tokens", "keep", "weights"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"leave out {flag}: --method {PLAIN} prunes nothing.")
