"""The command line of training, which has a flag for each setting."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from atp_patch.tools.command_line import OneLineParser, named_values
from atp_patch.training.settings import Settings

PROG = "python -m atp_patch.train"
_COMMANDS = ("file", "resume")  # arguments that are no settings


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line. What it parses has no entry for a flag that was not
    given, so that the flag does not replace a setting from the file.
    """
    parse = OneLineParser(
        prog=PROG,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train the thresholds of ATP-LLaVA, alone or with the language model.\n"
        "FILE is YAML with these settings (freeze_lm: false); flags win.",
    )
    parse.add_argument("file", nargs="?", type=Path, default=None, metavar="FILE")
    parse.add_argument(
        "--resume", action="store_true", default=False, help="go on from the newest checkpoint"
    )
    hints = get_type_hints(Settings)
    for entry in fields(Settings):
        flag = "--" + entry.name.replace("_", "-")
        text = entry.metadata["help"]
        if entry.name == "options":
            parse.add_argument("--option", action="append", metavar="NAME=VALUE", help=text)
        elif hints[entry.name] is bool:
            parse.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            default = "" if entry.default is None or "default" in text else f" ({entry.default})"
            parse.add_argument(flag, metavar="X", help=text + default)
    return parse


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """Pick the settings out of the parsed arguments.

    Raises:
        ConfigError: for an option without "=".
    """
    given = {name: value for name, value in vars(args).items() if name not in _COMMANDS}
    options = named_values(given.pop("option", []))
    return {**given, "options": options} if options else given
