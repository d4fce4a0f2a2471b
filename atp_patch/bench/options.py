"""The command line of the benchmark, and checks of its arguments before any work."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from atp_patch.bench.presets import PRESETS, Size
from atp_patch.contract.errors import ConfigError
from atp_patch.tools.command_line import OneLineParser, comma_separated, seed

DESCRIPTION = """Pruned against plain at the shapes of known models, in turns, in one process, with
random weights.

    python -m atp_patch.bench --preset llava-1.5-7b --scale 0.25 --target-tokens 144
    python -m atp_patch.bench --methods atp,fastv@2 --schedule 126,88,20 --layers 4,14,24
    python -m atp_patch.bench --follow-up 1,8,32
"""


DECODE_TOKENS = 8


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parse = OneLineParser(
        prog="python -m atp_patch.bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parse.add_argument
    add("--preset", choices=sorted(PRESETS), default="llava-1.5-7b")
    add("--scale", type=float, default=1.0, help="share of the layers that are built")
    add(
        "--methods",
        default="atp",
        help='comma-separated, with layers as in "atp,fastv@2"; prumerge+/atp prunes twice',
    )
    add(
        "--layers",
        type=comma_separated(int),
        help="pruning layers, e.g. 4,14,24; scaled by default",
    )
    budget = parse.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="share kept at each pruning layer")
    budget.add_argument("--target-tokens", type=float, help="average visual tokens, e.g. 144")
    budget.add_argument(
        "--schedule",
        type=comma_separated(int),
        help="visual tokens left at each of --layers, e.g. 126,88,20; methods with layers of their "
        "own keep as many on average",
    )
    add(
        "--image", type=comma_separated(size), help="width x height in pixels, e.g. 448x448,896x896"
    )
    add(
        "--batch-size",
        type=comma_separated(int),
        default=[1],
        help="one or more, e.g. 1,2,4,8,16,32",
    )
    add(
        "--prompt-tokens",
        type=comma_separated(int),
        default=[64],
        help="text tokens, one or more numbers",
    )
    add("--decode-tokens", type=int, default=DECODE_TOKENS)
    add("--runs", type=int, default=9)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--attn", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    add("--seed", type=seed, default=0)
    add(
        "--profile",
        action="store_true",
        help="also time the plain model at the lengths that pruning leaves: where time goes",
    )
    add(
        "--train",
        action="store_true",
        help="time training steps instead: plain, patched, and patched with the heads alone",
    )
    add(
        "--follow-up",
        type=comma_separated(int),
        metavar="V[,W..]",
        help="time a first and a second question about one image instead: plain, and VoCo with so "
        "many tokens, e.g. 1,8,32",
    )
    add("--gradient-checkpointing", action="store_true", help="with --train")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--plot", type=Path, metavar="FILE.png", help="draw speed-up against FLOPs ratio")
    return parse


def size(text: str) -> Size:
    """Read width and height from "896x672". argparse shows this function's name in its errors."""
    width, height = (int(side) for side in text.split("x"))
    if min(width, height) < 1:
        raise ValueError(f"{text} has a side without pixels")
    return width, height


def check_mode(args: argparse.Namespace) -> None:
    """Check that the arguments go with ``--train`` or ``--follow-up``, where these are given.

    Raises:
        ConfigError: naming an argument that does not.
    """
    if args.gradient_checkpointing and not args.train:
        raise ConfigError("--gradient-checkpointing goes with --train.")
    if args.train and args.follow_up:
        raise ConfigError("give one of --train and --follow-up.")
    if not (args.train or args.follow_up):
        return
    mode, why = (
        ("--train", "a model in training keeps its full length, whatever is pruned")
        if args.train
        else ("--follow-up", "it names its own numbers of tokens")
    )
    others = {
        "--methods": args.methods != "atp",
        "--keep, --target-tokens and --schedule": any(
            x is not None for x in (args.keep, args.target_tokens, args.schedule)
        ),
        "--layers": args.follow_up and args.layers is not None,
        "--profile": args.profile,
        "--plot": args.plot is not None,
        "--decode-tokens": args.decode_tokens != DECODE_TOKENS,
    }
    for name, given in others.items():
        if given:
            raise ConfigError(f"leave out {name} with {mode}: {why}.")
    if args.follow_up and min(args.follow_up) < 1:
        raise ConfigError("--follow-up: give numbers of VoCo tokens, from 1.")
