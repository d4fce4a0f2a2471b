"""What all command lines share: parsing, errors of one line, exit statuses, and a progress bar."""

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
# Errors of the system that come from its state or from a path, and not from a bug.
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
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, _shown(f"{self.prog}: {message} (see {self.prog} --help)\n"))


def machine(device: torch.device) -> str:
    """The name of what computes: the GPU's, or the CPU's with the number of threads."""
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
    """Parse the arguments, do the work, and report an error in one line on stderr.

    Args:
        parser: the parser of the arguments.
        work: is given the parsed arguments.
        argv: the arguments; None: those of the process.
        memory: what the user can do where memory does not suffice.
        stopped: what is printed after Ctrl-C.

    Returns:
        the exit status: 0 where the work was done; 2 where an argument or the data is wrong, memory
        does not suffice, or the system refuses to read or write a file; 130 after Ctrl-C. Any other
        exception is a bug, and is raised.
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
    """Refuse text that no path and no file in UTF-8 can hold.

    Args:
        name: what the text is, for the error.

    Raises:
        ConfigError: where it holds NUL or a lone surrogate. Python also reads a byte of a file name
            as a lone surrogate where the name is not UTF-8.
    """
    wrong = re.search("[\\0\ud800-\udfff]", text)
    if wrong:
        raise ConfigError(
            f"{name} holds the character {wrong[0]!a}, which is no text: {text!a}; give another, "
            "or rename the file."
        )


def comma_separated(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Make the ``type`` of an argument that takes several values.

    Args:
        kind: the type of each value.
    """

    def parse(text: str) -> list[Value]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__} list"  # argparse shows it in errors
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
    """Read options such as "name=value" into a mapping. A value is read as JSON, or else as a word.

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
    """Make a progress bar on stderr that shows how much is done and the time that is left.

    Returns:
        the bar of rich; None where rich is not installed, or stderr is no terminal.
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
    """The text with escapes in place of what UTF-8 cannot encode, such as some names of files."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _one_line(error: ATPError) -> str:
    text = str(error)
    if "worker process" in text:  # torch puts the worker's traceback before the message
        text = text.splitlines()[-1]
    return " ".join(text.split())


def _refusal(error: Exception) -> str | None:
    """The system's refusal that an exception reports, as a line; None where it reports none."""
    text = str(error)
    if isinstance(error, RuntimeError) and "inline_container" in text and "unexpected pos" in text:
        return "torch could not write a file to its end; make room on the disk."
    name = None
    if isinstance(error, OSError):
        code, name = error.errno, error.filename
    else:  # libraries in Rust, such as safetensors, tell of the system's errors in their text
        told = re.search(r"\(os error (\d+)\)", text)
        code = int(told[1]) if told else None
    if code not in _REFUSED:
        return None
    where = "" if name is None else f" ({name})"
    mend = "make room on the disk" if code in _FULL else "give another path, or mend this one"
    return " ".join(f"{os.strerror(code)}{where}; {mend}.".split())
