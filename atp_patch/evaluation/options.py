"""The command line of the evaluation, and checks of its arguments before any work."""

from __future__ import annotations

import argparse
from collections.abc import Container
from pathlib import Path
from typing import Any

from atp_patch.builtin import NAMES, SPLITS
from atp_patch.contract.errors import ConfigError
from atp_patch.tools.arguments import (
    HUB,
    Group,
    Parser,
    add_hub,
    add_layers,
    add_model,
    add_output,
    comma_separated,
)
from atp_patch.tools.files import check_folder

PROG = "python -m atp_patch.evaluate"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "Accuracy of pruned models against visual tokens, every method on the same questions.\n"
        "Random and uniform tokens, the unpruned model and the model without its image are\n"
        "always among what is measured. A killed run goes on where it was.",
        "--methods atp,fastv --budgets 0.5,0.25 --questions 100 --out results",
    )
    add_model(parse).set_defaults(model=next(iter(NAMES)))
    compared = add_compared(parse)
    compared.add_argument(
        "--drop-from",
        type=comma_separated(str),
        default=[],
        metavar="I[,J..]",
        help="also measure the model without any visual token from each of these decoder layers "
        "on; all: from each layer where this makes a difference",
    )
    compared.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="draws of what is random (default: 3)"
    )
    add = parse.add_argument_group("questions").add_argument
    add(
        "--tasks",
        type=comma_separated(str),
        default=["builtin"],
        metavar="T[,U..]",
        help="tasks, groups (builtin, dense, slanted, offgrid, shades; for models that read page, "
        "table, chart, map, icons), or all that need no reading (default: builtin)",
    )
    add("--questions", type=int, default=100, metavar="N", help="of each task (default: 100)")
    add("--split", choices=[s for s in SPLITS if s != "train"], default="test")
    add(
        "--answers",
        choices=("auto", "forced", "generate"),
        default="auto",
        help="forced: ask for the true answer's tokens, as exact as generating with the built-in "
        "tokenizer and several times as fast (auto: with that tokenizer alone)",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="of an answer, where answers are generated (default: what the tasks need, 16 or more)",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="questions a pass (default: 16)")
    output = add_output(parse, "the rows of the table")
    output.add_argument(
        "--out", type=Path, default=Path("results"), metavar="FOLDER", help="default: results"
    )
    output.add_argument(
        "--summaries",
        type=comma_separated(Path),
        metavar="A[,B..]",
        help="ask nothing, and make table and plots of the results in these folders, which are of "
        "one model and the same questions",
    )
    output.add_argument(
        "--no-plots", action="store_true", help="write no plots (they need matplotlib)"
    )
    return parse


def add_compared(parse: argparse.ArgumentParser) -> Group:
    """Add the options about methods, budgets and adapters that are compared.

    Returns:
        the group of those about methods and budgets.
    """
    group = parse.add_argument_group("what is compared")
    group.add_argument(
        "--methods",
        type=comma_separated(str),
        metavar="A[,B..]",
        help="default: all that need no training; NAME@I+J+K prunes before these layers, NAME:S+T "
        "has these budgets, FIRST/SECOND prunes before the decoder and inside it. Differences are "
        "to the first",
    )
    group.add_argument(
        "--budgets",
        type=comma_separated(float),
        default=[0.5, 0.25, 0.15],
        metavar="S[,T..]",
        help="visual tokens averaged over all decoder layers, as shares (default: 0.5,0.25,0.15)",
    )
    add_layers(group)
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of all methods that have it, or METHOD.NAME=VALUE of one; may be repeated",
    )
    adapters = parse.add_argument_group("adapters")
    adapters.add_argument(
        "--adapters",
        type=comma_separated(str),
        default=[],
        metavar="A[,B..]",
        help="saved adapters, those of the built-in model by name (shipped: all of them), Hub ids "
        "(USER/REPO or USER/REPO@REVISION), folders of trainings (adapter and LoRA), folders of "
        "several trainings, which are pooled as seeds are, or a folder of such folders; A~mean and "
        "A~shuffled are controls, with the mean of the learned thresholds or those of another "
        "question, at the same average on questions of the split train",
    )
    add_hub(adapters)
    return group


def hub_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return how the adapters that ``--adapters`` names are read from the Hub.

    Raises:
        ConfigError: where an option says so and there are no adapters.
    """
    hub = {name: getattr(args, name) for name in HUB}
    if not args.adapters and (given := next((name for name in HUB if hub[name]), None)):
        raise ConfigError(f"--{given.replace('_', '-')} goes with --adapters.")
    return hub


def check(args: argparse.Namespace) -> None:
    """Find out before the work what would only fail after it.

    Raises:
        ConfigError: naming the argument and the mend.
    """
    for name in ("questions", "seeds", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {value} must be at least 1.")
    for budget in args.budgets:
        if not 0 < budget <= 1:
            raise ConfigError(
                f"--budgets {budget:g}: a share of the visual tokens is above 0 and at most 1."
            )
    check_folder(args.out, "--out")


def drop_layers(given: list[str], num_layers: int, silent: Container[int] = ()) -> list[int]:
    """Return the layers that ``--drop-from`` names.

    Args:
        given: numbers as words; "all" stands for every layer from 1 on where dropping makes a
            difference.
        num_layers: how many layers the decoder has.
        silent: layers that add nothing: dropping tokens before or after such a layer is the same.

    Raises:
        ConfigError: for a word that is no layer of the decoder.
    """
    if given == ["all"]:
        return [layer for layer in range(1, num_layers) if layer - 1 not in silent]
    for text in given:
        if not text.isdecimal() or not 1 <= int(text) < num_layers:
            raise ConfigError(
                f"--drop-from {text}: give layers from 1 to {num_layers - 1}, or all."
            )
    return [int(text) for text in given]
