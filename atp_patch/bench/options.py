"""The command line of the benchmark, and checks of its arguments before any work."""

from __future__ import annotations

import argparse
from pathlib import Path

from atp_patch.contract.errors import ConfigError
from atp_patch.tools.arguments import (
    DTYPES,
    Parser,
    add_output,
    add_seed,
    comma_separated,
)

STDOUT = Path("-")  # what --json without a file stands for
PROG = "python -m atp_patch.bench"
DESCRIPTION = """Pruned against plain at the shapes of known models, in turns, in one process, with
random weights."""
DECODE_TOKENS = 8
Size = tuple[int, int]


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog, DESCRIPTION, "--preset llava-1.5-7b --scale 0.25 --methods atp,fastv@2 --keep 0.5"
    )
    model = parse.add_argument_group("model").add_argument
    model(
        "--preset",
        default="llava-1.5-7b",
        metavar="NAME",
        help="whose shapes (default: llava-1.5-7b); an unknown name is answered with all names",
    )
    model(
        "--scale", type=float, default=1.0, metavar="S", help="share of the layers that are built"
    )
    model("--attn", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    model(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )
    model("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    pruning = parse.add_argument_group("pruning")
    pruning.add_argument(
        "--methods",
        default="atp",
        metavar="A[,B..]",
        help='with layers as in "atp,fastv@2"; prumerge+/atp prunes twice (default: atp)',
    )
    pruning.add_argument(
        "--layers",
        type=comma_separated(int),
        metavar="I[,J..]",
        help="prune before these decoder layers (default: 4,14,24 of 32, in proportion)",
    )
    budget = pruning.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep", type=float, metavar="P", help="the share that a pruning layer keeps"
    )
    budget.add_argument(
        "--target-tokens",
        type=float,
        metavar="N",
        help="visual tokens averaged over all decoder layers (default: a quarter of the image's)",
    )
    budget.add_argument(
        "--schedule",
        type=comma_separated(int),
        metavar="N[,M..]",
        help="visual tokens left at each of --layers, e.g. 126,88,20; methods with layers of their "
        "own keep as many on average",
    )
    inputs = parse.add_argument_group("inputs").add_argument
    inputs(
        "--image",
        type=comma_separated(size),
        metavar="WxH[,..]",
        help="width x height in pixels, e.g. 448x448,896x896",
    )
    inputs(
        "--batch-size",
        type=comma_separated(int),
        default=[1],
        metavar="N[,M..]",
        help="one or more, e.g. 1,2,4,8,16,32 (default: 1)",
    )
    inputs(
        "--prompt-tokens",
        type=comma_separated(int),
        default=[64],
        metavar="N[,M..]",
        help="text tokens, one or more numbers (default: 64)",
    )
    measured = parse.add_argument_group("what is measured")
    measured.add_argument("--runs", type=int, default=9, metavar="N", help="rounds (default: 9)")
    measured.add_argument(
        "--decode-tokens",
        type=int,
        default=DECODE_TOKENS,
        metavar="N",
        help=f"after each prefill (default: {DECODE_TOKENS})",
    )
    measured.add_argument(
        "--profile",
        action="store_true",
        help="also time the plain model at the lengths that pruning leaves: where time goes",
    )
    measured.add_argument(
        "--train",
        action="store_true",
        help="time training steps instead: plain, patched, and patched with the heads alone",
    )
    measured.add_argument(
        "--follow-up",
        type=comma_separated(int),
        metavar="V[,W..]",
        help="time a first and a second question about one image instead: plain, and VoCo with so "
        "many tokens, e.g. 1,8,32",
    )
    measured.add_argument("--gradient-checkpointing", action="store_true", help="with --train")
    add_seed(measured, "weights and inputs")
    output = add_output(parse, "everything measured", json=False)
    output.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="print everything measured as JSON on stdout, or write it to FILE beside the tables",
    )
    output.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw speed-up against FLOPs ratio"
    )
    output.add_argument(
        "--growth-plot",
        type=Path,
        metavar="FILE.png",
        help="draw time against tokens; needs three sizes of --image or more",
    )
    output.add_argument(
        "--report",
        type=Path,
        metavar="FILE.md",
        help="write a page that says from which image, prompt and batch on pruning pays",
    )
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
        "--growth-plot": args.growth_plot is not None,
        "--report": args.report is not None,
        "--decode-tokens": args.decode_tokens != DECODE_TOKENS,
    }
    for name, given in others.items():
        if given:
            raise ConfigError(f"leave out {name} with {mode}: {why}.")
    if args.follow_up and min(args.follow_up) < 1:
        raise ConfigError("--follow-up: give numbers of VoCo tokens, from 1.")
