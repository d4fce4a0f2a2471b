"""Accuracy of pruned models against visual tokens: ``python -m atp_patch.evaluate``.

    python -m atp_patch.evaluate --methods atp,fastv --budgets 0.5,0.25,0.15 --questions 500

Writes a line for each chunk of answers, a summary, a table and plots to a folder; run again after a
kill, it goes on where it was. Exit status: 0, or 2 with one line on stderr where an argument is
wrong.
"""

from __future__ import annotations

import sys

from atp_patch.evaluation.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
