"""The console script ``atp-patch``: a subcommand for each ``python -m atp_patch.<name>``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from atp_patch.version import __version__


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        does: what it does, in a few words.
        module: the module whose ``main(argv, prog)`` runs it.
        options: the module whose ``parser(prog)`` makes its parser, and which needs no torch.
    """

    does: str
    module: str
    options: str


# By what they are for.
GROUPS = {
    "try": {
        "demo": Command(
            "ask about an image, plain and pruned, side by side",
            "atp_patch.commands.demo",
            "atp_patch.commands.demo_options",
        ),
    },
    "use": {
        "serve": Command(
            "serve a patched model over HTTP, as OpenAI's API",
            "atp_patch.commands.serve",
            "atp_patch.commands.serve_options",
        ),
    },
    "make": {
        "train": Command(
            "train thresholds, alone or with the language model",
            "atp_patch.training.command",
            "atp_patch.training.options",
        ),
        "calibrate": Command(
            "set learned thresholds to a budget on your data",
            "atp_patch.commands.calibrate",
            "atp_patch.commands.calibrate_options",
        ),
        "convert": Command(
            "rewrite checkpoints of other packages as transformers' own",
            "atp_patch.convert.__main__",
            "atp_patch.convert.options",
        ),
    },
    "measure": {
        "evaluate": Command(
            "accuracy against visual tokens, method by method",
            "atp_patch.evaluation.command",
            "atp_patch.evaluation.options",
        ),
        "evidence": Command(
            "visual tokens that questions need, and who keeps them",
            "atp_patch.evaluation.evidence_command",
            "atp_patch.evaluation.evidence_options",
        ),
        "bench": Command(
            "time a pruned model against the plain one",
            "atp_patch.bench.__main__",
            "atp_patch.bench.options",
        ),
    },
    "share": {
        "push": Command(
            "publish an adapter on the Hub",
            "atp_patch.commands.push",
            "atp_patch.commands.push_options",
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def usage() -> str:
    """Return the text of ``atp-patch --help``."""
    lines = ["usage: atp-patch COMMAND ...", ""]
    for group, commands in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:11}{command.does}" for name, command in commands.items()]
        lines.append("")
    return "\n".join(
        [
            *lines,
            "example:",
            '  atp-patch demo examples/scenes/01.png "How many red shapes are there?"',
            "",
            "More: atp-patch COMMAND --help. atp-patch --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"atp-patch {__version__}")
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}" if name else "no command given"
        print(f"atp-patch: {problem}; known are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return run(name, arguments[1:], f"atp-patch {name}")


def run(name: str, arguments: Sequence[str], prog: str) -> int:
    """Run a command and return its exit status. Its help comes without the command itself.

    Args:
        name: the name of the command.
        arguments: its arguments.
        prog: what help and errors call it.
    """
    command = COMMANDS[name]
    if {"-h", "--help"} & set(arguments):
        try:
            import_module(command.options).parser(prog).parse_args(arguments)
        except SystemExit as stop:
            return int(stop.code or 0)
    return int(import_module(command.module).main(arguments, prog))
