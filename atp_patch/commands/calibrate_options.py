"""The command line of calibration."""

from __future__ import annotations

import argparse
from pathlib import Path

from atp_patch.tools.arguments import (
    Parser,
    add_layers,
    add_model,
    add_output,
    add_target_tokens,
    add_weights,
)

PROG = "atp-patch calibrate"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "Set learned thresholds to a budget on your data, and save the adapter anew.\n"
        "Differences between pictures and questions stay; no labels are needed.",
        "--weights training --target-tokens 96 --data mine.json --out calibrated",
    )
    add_model(parse)
    adapter = add_weights(parse)
    add_layers(adapter)
    budget = parse.add_argument_group("budget")
    add_target_tokens(budget)
    data = parse.add_argument_group("data")
    data.add_argument(
        "--data",
        default="builtin",
        metavar="FILE",
        help="builtin, or a .json or .jsonl file in LLaVA's format (default: builtin)",
    )
    data.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of the images (default: the data file's)"
    )
    data.add_argument(
        "--samples", type=int, default=64, metavar="N", help="from the first on (default: 64)"
    )
    data.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="samples a pass (default: 8)"
    )
    output = add_output(parse, "what changed")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("calibrated"),
        metavar="FOLDER",
        help="a new folder for the adapter (default: calibrated)",
    )
    return parse
