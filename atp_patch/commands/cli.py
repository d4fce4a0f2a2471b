"""The console script ``atp-patch``: a subcommand for each ``python -m atp_patch.<name>``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from atp_patch.version import __version__

# For each command: the module whose ``main(argv)`` runs it, and what it does.
COMMANDS = {
    "demo": ("atp_patch.demo", "ask about an image, plain and pruned, side by side"),
    "train": ("atp_patch.train", "train thresholds, alone or with the language model"),
    "evaluate": ("atp_patch.evaluate", "accuracy against visual tokens, method by method"),
    "evidence": ("atp_patch.evidence", "visual tokens that questions need, and who keeps them"),
    "convert": ("atp_patch.convert.__main__", "checkpoints of other packages as transformers' own"),
    "bench": ("atp_patch.bench.__main__", "time a pruned model against the plain one"),
}


def usage() -> str:
    """Return the text of ``atp-patch --help``."""
    lines = [f"  {name:10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: atp-patch COMMAND ...",
            "",
            "commands:",
            *lines,
            "",
            "More: atp-patch COMMAND --help",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(f"atp-patch {__version__}")
        return 0
    if command not in COMMANDS:
        problem = f"unknown command {command!r}" if command else "no command given"
        print(f"atp-patch: {problem}; known are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, _ = COMMANDS[command]
    return int(import_module(module).main(arguments[1:]))
