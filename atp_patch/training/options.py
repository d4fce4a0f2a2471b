"""The command line of training, which has a flag for each setting."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from atp_patch.tools.arguments import Parser, add_output, add_token, named_values
from atp_patch.training.settings import GROUPS, Settings

PROG = "python -m atp_patch.train"
# Arguments that are no settings. A token is secret, and settings are written into files.
_COMMANDS = ("file", "resume", "token", "quiet", "json")
# What other commands call the same thing; the setting's own name is a flag too.
_WORDS = {"adapter": "weights", "keep": "keep-checkpoints"}


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line. What it parses has no entry for a flag that was not
    given, so that the flag does not replace a setting from the file.

    Args:
        prog: what help and errors call the command.
    """
    parse = Parser(
        prog,
        "Train the thresholds of ATP-LLaVA, alone or with the language model.\n"
        "FILE is YAML with these settings (freeze_lm: false); flags win.",
        "--out training --steps 300 --target-tokens 144",
        argument_default=argparse.SUPPRESS,
        usage=f"{prog} [FILE] [options]",
    )
    parse.add_argument("file", nargs="?", type=Path, default=None, metavar="FILE")
    parse.add_argument(
        "--resume", action="store_true", default=False, help="go on from the newest checkpoint"
    )
    hints = get_type_hints(Settings)
    groups = {name: parse.add_argument_group(name) for name in GROUPS}
    for entry in fields(Settings):
        group = groups[entry.metadata["group"]]
        flags = [f"--{entry.name.replace('_', '-')}"]
        flags[:0] = [f"--{_WORDS[entry.name]}"] if entry.name in _WORDS else []
        text = entry.metadata["help"]
        if entry.name == "options":
            group.add_argument("--option", action="append", metavar="NAME=VALUE", help=text)
        elif hints[entry.name] is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
        else:
            default = "" if entry.default is None or "default" in text else f" ({entry.default})"
            group.add_argument(*flags, dest=entry.name, metavar="X", help=text + default)
    add_token(groups["pruning"])
    add_output(parse, "where the results are and what was measured last")
    return parse


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """Pick the settings out of the parsed arguments.

    Raises:
        ConfigError: for an option without "=".
    """
    given = {name: value for name, value in vars(args).items() if name not in _COMMANDS}
    options = named_values(given.pop("option", []))
    return {**given, "options": options} if options else given
