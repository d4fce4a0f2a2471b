"""Accuracy of pruned models against visual tokens: ``python -m atp_patch.evaluate``.

    python -m atp_patch.evaluate --methods atp,fastv --budgets 0.5,0.25,0.15 --questions 500

Writes a line for each chunk of answers, a summary, a table and plots to a folder; run again after a
kill, it goes on where it was. Exit status: 0, or 2 with one line on stderr where an argument is
wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from atp_patch.commands.cli import run

PROG = "python -m atp_patch.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run("evaluate", sys.argv[1:] if argv is None else argv, PROG)


if __name__ == "__main__":
    sys.exit(main())
