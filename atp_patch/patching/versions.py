"""The versions that the tests run on, and a warning outside of them."""

from __future__ import annotations

import platform
import re
import warnings

import torch
import transformers

from atp_patch.contract.errors import UnsupportedVersionWarning

# The oldest and the newest version of each, as docs/versions.md names them.
TESTED = {
    "Python": ("3.10", "3.13"),
    "torch": ("2.4", "2.15"),
    "transformers": ("5.4", "5.24"),
}


def warn_of_untested_versions() -> None:
    """Warn where Python, torch or transformers is a version that the tests do not run on.

    The warning names this line, so that Python shows it once in a process for each of them.

    Warns:
        UnsupportedVersionWarning: for each that is older or newer.
    """
    installed = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name, (oldest, newest) in TESTED.items():
        found = installed[name]
        if _minor(found) < _minor(oldest):
            which, mend = "older", f"Install {name} {oldest} or newer"
        elif _minor(found) > _minor(newest):
            which, mend = "newer", f"Install {name} {newest} or a newer atp_patch"
        else:
            continue
        warnings.warn(
            f"{name} {found} is {which} than the versions that atp_patch is tested with, {oldest} "
            f"to {newest}; answers may be wrong. {mend}, or compare answers with and without "
            "pruning first.",
            UnsupportedVersionWarning,
            stacklevel=1,
        )


def _minor(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
