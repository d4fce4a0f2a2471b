"""How many visual tokens questions need, and which methods keep them: ``python -m
atp_patch.evidence``.

    python -m atp_patch.evidence --questions 50
    python -m atp_patch.evidence --model FOLDER --methods atp,fastv --budgets 0.25

Exit status: 0, or 2 with one line on stderr where an argument is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from atp_patch.commands.cli import run

PROG = "python -m atp_patch.evidence"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run("evidence", sys.argv[1:] if argv is None else argv, PROG)


if __name__ == "__main__":
    sys.exit(main())
