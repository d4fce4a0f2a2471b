"""Publishing an adapter on the Hub: ``atp-patch push FOLDER USER/REPO``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from atp_patch.commands.push_options import PROG, parser
from atp_patch.evaluation.card import results_of
from atp_patch.tools.command_line import execute, shows_progress
from atp_patch.tools.loading import quiet_transformers
from atp_patch.tools.publishing import push_folder


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit status of :func:`execute`."""
    return execute(
        parser(prog),
        _command,
        argv,
        memory="push from where there is more of it.",
        stopped="stopped; nothing was published, and the same command goes on.",
    )


def _command(args: argparse.Namespace) -> None:
    results = args.results
    if results is None and (args.folder / "results").is_dir():
        results = args.folder / "results"
    measured = None if results is None else results_of(Path(args.folder), Path(results))
    with quiet_transformers(progress=shows_progress(args)):
        address = push_folder(
            args.folder,
            args.repository,
            token=args.token,
            private=True if args.private else None,
            revision=args.revision,
            license=args.license,
            results=measured,
            message=args.message,
        )
    told = {"repository": args.repository, "commit": address}
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        print(f"Pushed {args.folder} to {args.repository}: {address}")
        print(f'It is loaded by: atp_patch.load_trained(model, "{args.repository}")')
