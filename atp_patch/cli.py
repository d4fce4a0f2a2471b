"""The console script ``atp-patch``: one subcommand for each ``python -m atp_patch.<name>``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from atp_patch import __version__, demo

COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {"demo": demo.main}

USAGE = f"""usage: atp-patch COMMAND ...

commands:
  demo    ask about an image, plain and pruned, side by side

atp-patch COMMAND --help tells a command's options. This is atp-patch {__version__}."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help", "--version"):
        print(f"atp-patch {__version__}" if arguments[0] == "--version" else USAGE)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        given = repr(arguments[0]) if arguments else "none"
        print(
            f"atp-patch: give a command of: {', '.join(COMMANDS)} (given: {given}).",
            file=sys.stderr,
        )
        return 2
    name, *rest = arguments
    return COMMANDS[name](rest, f"atp-patch {name}")
