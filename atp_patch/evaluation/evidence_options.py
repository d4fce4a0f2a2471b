"""The command line about the tokens that questions need."""

from __future__ import annotations

import argparse
from pathlib import Path

from atp_patch.builtin import SPLITS
from atp_patch.evaluation.options import add_compared
from atp_patch.tools.arguments import DTYPES, Parser, add_output, comma_separated

PROG = "python -m atp_patch.evidence"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "How many visual tokens the questions about generated documents need, and, with --model,\n"
        "which share of these each method keeps at each pruning layer.",
        "--model FOLDER --methods atp,fastv --budgets 0.25",
    )
    model = parse.add_argument_group("model")
    model.add_argument(
        "--model", metavar="MODEL", help="a folder or Hub id of a model that reads words"
    )
    model.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )
    model.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    compared = add_compared(parse)
    compared.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="draws of what is random (default: 1)"
    )
    questions = parse.add_argument_group("questions")
    questions.add_argument(
        "--tasks",
        type=comma_separated(str),
        metavar="T[,U..]",
        help="tasks or groups about documents (default: all kinds of documents)",
    )
    questions.add_argument(
        "--questions", type=int, default=50, metavar="N", help="of each task (default: 50)"
    )
    questions.add_argument(
        "--split", choices=[s for s in SPLITS if s != "train"], default="development"
    )
    questions.add_argument(
        "--token-px",
        type=int,
        default=16,
        metavar="PX",
        help="side of the square that a visual token shows, for the budgets without a model "
        "(default: 16)",
    )
    output = add_output(parse, "each measured value")
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="also write each measured value as a JSON line"
    )
    return parse
