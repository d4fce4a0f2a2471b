"""Reading and writing files: whole or not at all, and with errors that can be caught."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp_patch.contract.errors import ConfigError
from atp_patch.scratch import remove, scratch_beside


def check_folder(path: Path, name: str) -> None:
    """Check before the work that a folder can be made, or can be written if it is there.

    Args:
        path: the path of the folder.
        name: the name of the argument that gave the folder, for the error.

    Raises:
        ConfigError: where a part of the path is a file, or may not be written.
    """
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{name}: {nearest} is a file; give a folder that can be written.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: {nearest} may not be written; give a folder that can be.")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file, or a folder that is not there yet, whole or not at all.

    Yields:
        a path to write to, in the same folder and with the same suffix. At the end, what was
        written there takes the place of ``path``. Where writing fails, it is removed, and an
        earlier file stays. For a device or a pipe, which cannot be replaced, ``path`` itself is
        yielded.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()  # so that a symbolic link stays, and its file is replaced
    scratch = scratch_beside(path)
    try:
        yield scratch
        scratch.replace(path)
    finally:
        remove(scratch)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with replaced(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def parse_json(text: str) -> Any:
    """Read a text in JSON.

    Raises:
        ValueError: where it is not JSON, or is nested more deeply than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply to be read") from error
