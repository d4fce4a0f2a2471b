"""``python -m atp_patch`` is the console script ``atp-patch``."""

from __future__ import annotations

import sys

from atp_patch.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
