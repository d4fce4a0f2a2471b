"""How many visual tokens questions need, and which methods keep them: ``python -m
atp_patch.evidence``.

    python -m atp_patch.evidence --questions 50
    python -m atp_patch.evidence --model FOLDER --methods atp,fastv --budgets 0.25

Exit status: 0, or 2 with one line on stderr where an argument is wrong.
"""

from __future__ import annotations

import sys

from atp_patch.evaluation.evidence_command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
