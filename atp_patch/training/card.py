"""The part of an adapter's card that is about its training."""

from __future__ import annotations

from collections.abc import Sequence

from atp_patch.tools.calibration import Calibration
from atp_patch.training.settings import Settings


def card(
    settings: Settings,
    history: Sequence[dict[str, float]],
    samples: int,
    skipped: set[int],
    data: str,
    calibration: Calibration | None,
) -> str:
    """Write the section of the adapter's card that says how it was trained, and what was measured
    then.

    Args:
        settings: the settings of the training.
        history: entries of the Trainer's log.
        samples: how many samples the data has.
        skipped: numbers of the samples that were left out.
        data: name of the data.
        calibration: what calibrating did at the end; None where it was not done.
    """
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
