"""Trains the second built-in model from the first: `python -m workshop.dynamic.train
--work FOLDER`.

First the tower learns to imitate the first model's tower. Then the decoder, which starts as the
first model's, learns to read it. Then both learn together. A run that was killed continues from its
last checkpoint.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atp_patch.builtin import load_builtin
from workshop.batches import BatchSpec, make_batch
from workshop.dynamic.architecture import start_from
from workshop.dynamic.batches import sized_batch
from workshop.dynamic.objectives import distil_loss, questions_loss
from workshop.dynamic.stages import STAGES
from workshop.export import read_checkpoint
from workshop.forward import to_pixel_values
from workshop.learner import (
    Learner,
    load_checkpoint,
    make_heads,
    make_optimizers,
    steps_done,
)
from workshop.train import run_stage

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, Qwen3VLForConditionalGeneration


def start(first: LlavaForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """Make the model before its first step."""
    torch.manual_seed(0)
    batch = make_batch(BatchSpec(16, offset=4_900_000), 0)
    return start_from(first, to_pixel_values(batch["pixels"]), torch.as_tensor(batch["ids"]))


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--until", default=STAGES[-1].name, help="last stage to run")
    parser.add_argument(
        "--first", type=Path, help="a checkpoint of the first model (default: the shipped one)"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    first = load_builtin()[0] if options.first is None else read_checkpoint(options.first)
    model, heads = start(first.eval()), make_heads()
    before: Path | None = None
    for number, stage in enumerate(STAGES):
        torch.manual_seed(1 + number)
        path = options.work / f"{number}-{stage.name}.safetensors"
        if not path.exists() or steps_done(path) < stage.steps:
            learner = Learner(model, heads, [])
            if before is not None:
                load_checkpoint(before, learner, with_optimizers=False)
            learner = Learner(model, heads, make_optimizers(model, heads, stage))
            if stage.kind == "distil":
                run_stage(learner, stage, path, partial(distil_loss, learner, first), sized_batch)
            else:
                run_stage(
                    learner, stage, path, partial(questions_loss, learner, stage), sized_batch
                )
        before = path
        if stage.name == options.until:
            break


if __name__ == "__main__":
    main()
