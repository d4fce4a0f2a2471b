"""Running a command line: errors of one line, exit statuses, silence, and progress bars."""

from __future__ import annotations

import argparse
import errno
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atp_patch.contract.errors import ATPError
from atp_patch.tools.arguments import check_text, printable

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


def machine(device: torch.device) -> str:
    """Return the name of what computes: the GPU's, or the CPU's with the number of threads."""
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
    memory: str = "try --dtype bfloat16, another --device, or a smaller model.",
    stopped: str = "stopped.",
) -> int:
    """Parse the arguments, do the work, and report an error in one line on stderr.

    With ``--quiet`` nothing else is written to stderr.

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
        with _silence(getattr(args, "quiet", False)):
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
    sys.stderr.write(printable(f"{parser.prog}: {problem}\n"))
    return status


@contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Drop what is written to stderr, warnings included, where that is asked for."""
    if not quiet:
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was too small, also on CPUs, where torch has no exception for it."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)


def shows_progress(args: argparse.Namespace) -> bool:
    """Return whether progress is shown: stderr is a terminal, and ``--quiet`` was not given."""
    return sys.stderr.isatty() and not getattr(args, "quiet", False)


@contextmanager
def progress_bar(
    label: str, total: int | None, done: int = 0, *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show how much of some work is done, on stderr where that is a terminal, else nothing.

    Args:
        label: what is counted.
        total: how many there are; None: that is not known.
        done: how many were done before.
        shown: whether there is a bar at all; of several processes one shows it.

    Yields:
        a function to be called with the number of further ones that are done.
    """
    bar = terminal_bar(label) if shown else None
    if bar is None:
        yield lambda count: None
        return
    with bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


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


def _one_line(error: ATPError) -> str:
    text = str(error)
    if "worker process" in text:  # torch puts the worker's traceback before the message
        text = text.splitlines()[-1]
    return " ".join(text.split())


def _refusal(error: Exception) -> str | None:
    """Return the system's refusal that an exception reports, as a line, or None."""
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
