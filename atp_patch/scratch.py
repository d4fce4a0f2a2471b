"""Scratch files and folders beside a result, of which killed processes leave none for good.

The name of a scratch file holds the computer and the process that writes it. Whoever begins one
removes those beside it whose process on this computer is gone.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".atp_patch-"


def scratch_beside(path: Path) -> Path:
    """Return a new name of a scratch file or folder beside ``path``, with the same suffix.

    What killed processes of this computer left in that folder is removed. What another computer
    or container wrote there stays, as its process may be at work.
    """
    _remove_abandoned(path.parent)
    owner = f"{_PREFIX}{_computer()}-{os.getpid()}-"
    return path.with_name(f"{owner}{secrets.token_hex(4)}{path.suffix}")


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Make a scratch folder beside ``path``, and remove it at the end if it is still there.

    At the end abandoned scratch is looked for once more: a program that a killed process had
    started, such as pip, may have gone on until then.

    Raises:
        OSError: where it cannot be made.
    """
    folder = scratch_beside(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)
        _remove_abandoned(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the scratch files and folders in a folder whose process on this computer is gone."""
    begin = re.escape(f"{_PREFIX}{_computer()}-")
    with suppress(OSError):  # the folder cannot be listed or changed; writing will say so
        for left in folder.iterdir():
            owner = re.match(rf"{begin}(\d+)-", left.name)
            if owner is not None and not _runs(int(owner[1])):
                remove(left)


def _computer() -> str:
    """Return a name of where process numbers are unique: this computer, or a container on it.

    Containers may share a folder and the computer's name, but each has its own process numbers.
    """
    name = platform.node()
    with suppress(OSError):  # not on Linux
        name += str(Path("/proc/self/ns/pid").readlink())
    return re.sub(r"\W", "_", name)


def _runs(process: int) -> bool:
    """Whether a process of this computer runs; always True where it cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
