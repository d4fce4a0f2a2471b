"""Training thresholds, alone or with the language model: ``python -m atp_patch.train``.

    python -m atp_patch.train --out training --steps 300
    python -m atp_patch.train examples/llava15_665k.yaml --data mix665k.json --images images

Settings come from a YAML file and flags, and flags win. It writes checkpoints to go on from, and
ends with an adapter folder and its card. Exit status: 0, 2 with one line on stderr where an
argument or the data is wrong, 130 where it was stopped.
"""

from __future__ import annotations

import sys

from atp_patch.training.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
