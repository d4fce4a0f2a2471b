"""What the command lines have in common."""

from __future__ import annotations

import argparse
import errno
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from atp_patch.contract.errors import ATPError, ConfigError
from atp_patch.tools.files import parse_json

if TYPE_CHECKING:
    from rich.progress import Progress

INTERRUPTED = 130
# What the system refuses because of its state or a path, and no program can mend.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = _FULL | {
    errno.EACCES,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
_PROCESSORS = Path("/proc/cpuinfo")
Value = TypeVar("Value")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, _shown(f"{self.prog}: {message} (see {self.prog} --help)\n"))


def machine(device: torch.device) -> str:
    """What computes, for the record: a GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _PROCESSORS.read_text("utf-8").splitlines() if _PROCESSORS.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor()
    known = ", ".join(part for part in (name, platform.machine()) if part)
    return f"{known}, {torch.get_num_threads()} threads"


def execute(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
    *,
    memory: str,
    stopped: str = "stopped.",
) -> int:
    """Parse the arguments and do the work; what goes wrong is one line on stderr.

    Args:
        argv: the arguments; None: those of the process.
        memory: what to do where memory does not suffice.
        stopped: what is said after Ctrl-C.

    Returns:
        The exit status: 0; 2 where an argument or the data is wrong, memory does not suffice, or
        the system refuses to read or write a file; 130 after Ctrl-C. Every other exception is a
        bug, and is raised.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser.parse_args(given)
    except SystemExit as stop:
        return int(stop.code or 0)
    status = 2
    try:
        for text in given:
            check_text(text, "an argument")
        work(args)
    except ATPError as error:
        problem = _one_line(error)
    except KeyboardInterrupt:
        problem, status = stopped, INTERRUPTED
    except Exception as error:
        found = f"out of memory; {memory}" if is_out_of_memory(error) else _refusal(error)
        if found is None:
            raise
        problem = found
    else:
        return 0
    sys.stderr.write(_shown(f"{parser.prog}: {problem}\n"))
    return status


def check_text(text: str, name: str) -> None:
    """Refuse text that can stand in no path and in no file that is written in UTF-8.

    Args:
        name: what the text is, for the error.

    Raises:
        ConfigError: where it holds NUL, or a half of a surrogate pair (which is also how Python
            shows the bytes of a file name that is not UTF-8).
    """
    wrong = re.search("[\\0\ud800-\udfff]", text)
    if wrong:
        raise ConfigError(
            f"{name} holds the character {wrong[0]!a}, which is no text: {text!a}; give another, "
            "or rename the file."
        )


def comma_separated(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """The ``type`` of an argument that takes several values."""

    def parse(text: str) -> list[Value]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__} list"  # argparse names it in errors
    return parse


def seed(text: str) -> int:
    """The ``type`` of an argument that seeds torch's generators."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an int from 0 to 2**32 - 1")
    return value


def named_values(given: list[str]) -> dict[str, Any]:
    """``name=value`` as a mapping; values are JSON where they can be, else words.

    Raises:
        ConfigError: where there is no "=".
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--option {text}: give NAME=VALUE, for example slope=10.")
        try:
            parsed = parse_json(value)
            options[name] = tuple(parsed) if isinstance(parsed, list) else parsed
        except ValueError:
            options[name] = value
    return options


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, also on CPUs, where torch has no exception of its own."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)


def terminal_bar(label: str) -> Progress | None:
    """A bar of rich on stderr, with how many are done and the time that is left; None where rich is
    not installed, or stderr is no terminal.
    """
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    counts = progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
    return progress.Progress(label, *counts, console=console)


def _shown(text: str) -> str:
    """The text with escapes for what cannot be encoded: names of files need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _one_line(error: ATPError) -> str:
    text = str(error)
    if "worker process" in text:  # which puts the place where it happened before the message
        text = text.splitlines()[-1]
    return " ".join(text.split())


def _refusal(error: Exception) -> str | None:
    """What the system refused to do, if that is what the exception is about."""
    text = str(error)
    if isinstance(error, RuntimeError) and "inline_container" in text and "unexpected pos" in text:
        return "torch could not write a file to its end; make room on the disk."
    name = None
    if isinstance(error, OSError):
        code, name = error.errno, error.filename
    else:  # libraries in Rust, such as safetensors and tokenizers, have no class of their own
        told = re.search(r"\(os error (\d+)\)", text)
        code = int(told[1]) if told else None
    if code not in _REFUSED:
        return None
    where = "" if name is None else f" ({name})"
    mend = "make room on the disk" if code in _FULL else "give another path, or mend this one"
    return " ".join(f"{os.strerror(code)}{where}; {mend}.".split())
