"""The main job, as a command: ``python -m atp_patch.demo IMAGE "QUESTION"``.

It asks a model about an image, plain and pruned, and shows what was saved. ``--help`` lists the
options. Exit status: 0, 2 with one line on stderr where the input is wrong, 130 where it was
stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from atp_patch.commands.cli import run
from atp_patch.commands.demo_options import PROG


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run("demo", sys.argv[1:] if argv is None else argv, PROG)


if __name__ == "__main__":
    sys.exit(main())
