"""TRL's SFTTrainer: it scores answers itself, so it is asked to take the model's own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scenes import arguments, load
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import atp_patch
from atp_patch.training.records import Scenes


class PruningSFTTrainer(SFTTrainer):
    """The model's loss holds the terms of the thresholds; SFTTrainer's own does not."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' Trainer."""
        return Trainer.compute_loss(self, *args, **kwargs)


def row(index: int) -> dict[str, Any]:
    """A scene as TRL takes it."""
    scene = Scenes(index + 1)[index]
    (_, question), (_, answer) = scene.turns
    text = question.removeprefix("<image>").strip()
    return {
        "images": list(scene.images),
        "prompt": [{"role": "user", "content": text}],
        "completion": [{"role": "assistant", "content": answer}],
    }


asked = arguments()
model, processor = load(asked)
settings = SFTConfig(
    output_dir=str(Path(asked.out) / "checkpoints"),
    max_steps=asked.steps,
    per_device_train_batch_size=asked.batch_size,
    learning_rate=2e-3,
    logging_steps=1,
    max_length=None,
    bf16=torch.cuda.is_available(),
    gradient_checkpointing_kwargs={"use_reentrant": False},
    report_to=[],
)
rows = Dataset.from_list([row(index) for index in range(asked.steps * asked.batch_size)])
trainer = PruningSFTTrainer(model, settings, train_dataset=rows, processing_class=processor)
trainer.train()
state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all processes
if trainer.args.should_save:
    atp_patch.save_pretrained(model, asked.out, state_dict=state)
