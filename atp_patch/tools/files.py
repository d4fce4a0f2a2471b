"""Files and folders that the commands read and write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp_patch.contract.errors import ConfigError


def check_folder(path: Path, name: str) -> None:
    """Find out before the work whether a folder can be made, or written if it is there.

    Args:
        name: of the argument that gave the folder, for the error.

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
        a path in the same folder, with the same suffix, to write to. What was written there takes
        the place of ``path`` at the end; where writing fails, it is removed, and an earlier file
        stays. Devices and pipes, which cannot be replaced, are yielded themselves.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()  # a link keeps leading to the file
    scratch = path.with_name(f".atp_patch-{os.getpid()}{path.suffix}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with replaced(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def parse_json(text: str) -> Any:
    """What a text in JSON says.

    Raises:
        ValueError: where it is not JSON, or is nested more deeply than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply to be read") from error
