"""The command line of training, which has a flag for each setting.

transformers' ``HfArgumentParser`` makes flags of a dataclass too. It is not used here: it loads
torch to print help, and it gives a flag that was left out its default, which would replace what the
YAML file says.
"""

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
# What other commands call the same thing. The setting's own name is a flag that help does not show.
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
        own = f"--{entry.name.replace('_', '-')}"
        flag = own if entry.name not in _WORDS else f"--{_WORDS[entry.name]}"
        text = entry.metadata["help"]
        if entry.name == "options":
            group.add_argument("--option", action="append", metavar="NAME=VALUE", help=text)
        elif hints[entry.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            default = "" if entry.default is None or "default" in text else f" ({entry.default})"
            group.add_argument(flag, dest=entry.name, metavar="X", help=text + default)
        if flag != own:
            group.add_argument(own, dest=entry.name, help=argparse.SUPPRESS)
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
