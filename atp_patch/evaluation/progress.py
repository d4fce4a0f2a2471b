"""Progress of a run on stderr: a bar on a terminal if rich is installed, else a line at times."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from atp_patch.tools.command_line import terminal_bar

SECONDS_BETWEEN_LINES = 30.0
Advance = Callable[[int], None]


@contextmanager
def progress(total: int, done: int) -> Iterator[Advance]:
    """Show progress inside this context.

    Args:
        total: number of answers of all settings.
        done: how many of them an earlier run has answered.

    Yields:
        a function to be called with the number of further answers.
    """
    bar = terminal_bar("answers")
    if bar is None:
        yield _Lines(total, done).advance
        return
    with bar:
        task = bar.add_task("answers", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """Writes one line now and then, which suits a log."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.told_at = total, done, time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.told_at >= SECONDS_BETWEEN_LINES:
            self.told_at = time.monotonic()
            sys.stderr.write(f"{self.done} of {self.total} answers\n")
