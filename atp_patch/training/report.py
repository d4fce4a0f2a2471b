"""How far a training is, and what the card says of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from atp_patch.tools.calibration import Calibration
from atp_patch.tools.command_line import terminal_bar
from atp_patch.training.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_PARTS = ("next_token", "atp", "target", "distill")


class Progress(TrainerCallback):
    """One line on stderr for each line of the log, and below them a bar where
    :func:`terminal_bar` gives one.

    Attributes:
        step_s: seconds a step since the last line; the first step of a run, which warms up, apart.
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
        """Move the bar; start the clock after the first step."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)
        if self._mark is None:
            self._mark = (state.global_step, time.monotonic())

    def close(self) -> None:
        """Leave the bar as it is, and the terminal as it was."""
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


def card(
    settings: Settings,
    history: Sequence[dict[str, float]],
    samples: int,
    skipped: set[int],
    data: str,
    calibration: Calibration | None,
) -> str:
    """A section for the adapter's card: how it was trained, and what was measured then."""
    logs = [entry for entry in history if "next_token" in entry]
    learned = "the threshold heads alone, the language model frozen"
    rates = f"heads {settings.atp_lr:g}"
    if settings.lora_rank:
        learned = f"the threshold heads and LoRA of rank {settings.lora_rank} on the decoder"
    elif not settings.freeze_lm:
        learned = "the threshold heads and the model, but not its vision tower"
    if settings.lora_rank or not settings.freeze_lm:
        rates += f", model {settings.lr:g}"
    if settings.distill:
        learned += f"; KL divergence to the unpruned model with weight {settings.distill:g}"
    lines = [
        "## Training",
        "",
        f"- learned: {learned}",
        f"- data: {data}, {samples} samples; {len(skipped)} were found bad and left out",
        f"- {int(logs[-1]['step']) if logs else 0} steps of {settings.batch_size} samples, AdamW, "
        f"learning rates {rates}, {settings.schedule}, warm-up {settings.warmup:g}, "
        f"seed {settings.seed}, {settings.dtype}",
    ]
    if calibration is not None:
        lines.append(
            f"- calibrated on {calibration.samples} of the samples: from an average of "
            f"{calibration.before:.1f} visual tokens to {calibration.after:.1f}"
        )
    if logs:
        lines += ["", *_table(logs[0], logs[-1]), ""]
        lines.append(
            "Measured on the training samples themselves, averaged over the steps since the line "
            "before (in the main process); nothing held out was measured here. An answer is right "
            "if every token of it is the likeliest, given the true tokens before it."
        )
    return "\n".join(lines) + "\n"


def _table(first: dict[str, float], last: dict[str, float]) -> list[str]:
    names = {
        "loss": "loss, all terms",
        "next_token": "next-token loss",
        "atp": "L_atp (eq. 12)",
        "target": "L_target (eq. 13)",
        "distill": "KL divergence",
        "average_tokens": "visual tokens averaged over all layers",
        "visual_tokens": "visual tokens before pruning",
        "token_accuracy": "answer tokens right",
        "answer_accuracy": "answers right",
    }
    return [
        f"| | to step {int(first['step'])} | to step {int(last['step'])} |",
        "|---|---|---|",
        *(
            f"| {text} | {first[name]:.4g} | {last[name]:.4g} |"
            for name, text in names.items()
            if name in first and name in last
        ),
    ]
