"""Trains the first built-in model from scratch: `python -m workshop.train --work FOLDER`.

The stages train the tower alone on patch labels, then a shallow decoder on some of the visual
tokens, then both on all of them. A run that was killed continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from workshop.architecture import ORIGINALS, build, recentre
from workshop.batches import Batch, batches, make_batch
from workshop.forward import to_pixel_values, tower_forward
from workshop.learner import (
    Learner,
    load_checkpoint,
    make_heads,
    make_optimizers,
    rate_share,
    save_checkpoint,
    steps_done,
)
from workshop.objectives import decoder_loss, tower_loss
from workshop.stage import Stage
from workshop.stages import STAGES

Compute = Callable[[Batch, int], tuple[Tensor, dict[str, float]]]
"""A function of a batch and the number of the step that returns the loss and the logged values."""


def run_stage(
    learner: Learner,
    stage: Stage,
    path: Path,
    compute: Compute,
    make: Callable[..., Batch] = make_batch,
    log_every: int = 20,
) -> None:
    """Train one stage, continuing from its checkpoint at `path` if there is one."""
    step = load_checkpoint(path, learner, with_optimizers=True) if path.exists() else 0
    start = saved = time.monotonic()
    sums: dict[str, list[float]] = {}
    for batch in batches(stage.batch, step, stage.steps, make):
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * rate_share(step, stage)
        loss, shares = compute(batch, step)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.model.parameters(), 5.0)
        for optimizer in learner.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        for name, value in ({"loss": loss.item()} | shares).items():
            if value == value:
                sums.setdefault(name, []).append(value)
        if step % log_every == 0 or step == stage.steps:
            row: dict[str, object] = {"stage": stage.name, "step": step}
            row["seconds"] = round(time.monotonic() - start, 1)
            row |= {name: round(_mean(values), 4) for name, values in sums.items()}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            sums = {}
        if time.monotonic() - saved > 120 or step == stage.steps:
            save_checkpoint(path, learner, step)
            saved = time.monotonic()


def _compute(learner: Learner, stage: Stage, compiled: bool) -> Compute:
    loss = tower_loss if stage.kind == "tower" else decoder_loss
    return lambda batch, step: loss(learner, batch, stage, step, compiled)


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items)


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--until", default=STAGES[-1].name, help="last stage to run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, heads = build(len(ORIGINALS)), make_heads()
    before: Path | None = None
    for number, stage in enumerate(STAGES):
        torch.manual_seed(1 + number)
        path = options.work / f"{number}-{stage.name}.safetensors"
        if path.exists() and steps_done(path) >= stage.steps and stage.name != options.until:
            before = path
            continue
        learner = Learner(model, heads, [])
        if before is not None:
            load_checkpoint(before, learner, with_optimizers=False)
        if stage.recentre and not path.exists():
            pixels = make_batch(replace(stage.batch, images=16), 0)["pixels"]
            recentre(model, tower_forward(model, to_pixel_values(pixels)))
        learner = Learner(model, heads, make_optimizers(model, heads, stage))
        run_stage(learner, stage, path, _compute(learner, stage, not options.no_compile))
        before = path
        if stage.name == options.until:
            break


if __name__ == "__main__":
    main()
