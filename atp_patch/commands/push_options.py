"""The command line of publishing."""

from __future__ import annotations

import argparse
from pathlib import Path

from atp_patch.tools.arguments import Parser, add_output, add_token

PROG = "atp-patch push"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "Publish an adapter, and what learned beside it, in one commit on the Hub, with a card.",
        "training ann/my-adapter --license apache-2.0 --results results",
    )
    parse.add_argument(
        "folder", type=Path, metavar="FOLDER", help="what a training or save_pretrained wrote"
    )
    parse.add_argument(
        "repository", metavar="USER/REPO", help="the repository, which is made if it is new"
    )
    hub = parse.add_argument_group("Hub")
    add_token(hub)
    hub.add_argument(
        "--revision", metavar="NAME", help="the branch to push to (default: the main one)"
    )
    hub.add_argument("--private", action="store_true", help="make a new repository private")
    hub.add_argument("--message", metavar="TEXT", help="of the commit")
    card = parse.add_argument_group("card")
    card.add_argument(
        "--license",
        metavar="NAME",
        help="the licence of the adapter by the Hub's name, such as apache-2.0 or cc-by-4.0",
    )
    card.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="the --out of an evaluation of this adapter, whose numbers the card shows (default: "
        "FOLDER/results if it is there)",
    )
    add_output(parse, "the repository and the address of the commit")
    return parse
