"""Training thresholds, alone or with the language model: ``python -m atp_patch.train``.

    python -m atp_patch.train --out training --steps 300
    python -m atp_patch.train examples/llava15_665k.yaml --data mix665k.json --images images

Settings come from a YAML file and flags, and flags win. It writes checkpoints to go on from, and
ends with an adapter folder and its card. Exit status: 0, 2 with one line on stderr where an
argument or the data is wrong, 130 where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from atp_patch.commands.cli import run

PROG = "python -m atp_patch.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run("train", sys.argv[1:] if argv is None else argv, PROG)


if __name__ == "__main__":
    sys.exit(main())
