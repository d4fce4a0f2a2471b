"""Progress of a training on stderr: the lines of its log, and a bar where there is a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from atp_patch.tools.command_line import terminal_bar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_PARTS = ("next_token", "atp", "target", "distill")


class Progress(TrainerCallback):
    """Writes a line to stderr for each entry of the log, and shows a bar below the lines where
    :func:`terminal_bar` gives one.

    Attributes:
        step_s: for each line, the seconds that a step took since the line before. The first step of
            a run does not count, as it warms up.
    """

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self._mark: tuple[int, float] | None = None
        self._bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self._bar = terminal_bar("steps") if state.is_world_process_zero else None
        if self._bar is not None:
            self._bar.add_task("steps", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, and start the clock after the first step."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)
        if self._mark is None:
            self._mark = (state.global_step, time.monotonic())

    def close(self) -> None:
        """Stop drawing the bar, and give the terminal its cursor back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Write the line."""
        if not state.is_world_process_zero or logs is None or "next_token" not in logs:
            return
        words = [f"step {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.4f}"]
        words += [f"{name} {logs[name]:.4f}" for name in _PARTS if name in logs]
        if "average_tokens" in logs:
            words.append(f"tokens {logs['average_tokens']:.1f} of {logs['visual_tokens']:.0f}")
        words.append(f"right {logs['token_accuracy']:.3f} / {logs['answer_accuracy']:.3f}")
        if logs["skipped"]:
            words.append(f"skipped {logs['skipped']:.0f}")
        step, start = self._mark or (state.global_step, time.monotonic())
        if state.global_step > step:
            self.step_s.append((time.monotonic() - start) / (state.global_step - step))
            words.append(f"{self.step_s[-1]:.2f} s a step")
        self._mark = (state.global_step, time.monotonic())
        line = "  ".join(words)
        if self._bar is None:
            sys.stderr.write(line + "\n")
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
