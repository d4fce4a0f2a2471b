"""transformers' Trainer as it is."""

from __future__ import annotations

from pathlib import Path

from scenes import arguments, dataset, load
from transformers import Trainer, TrainingArguments

import atp_patch

asked = arguments()
model, processor = load(asked)
samples, collate = dataset(model, processor, asked.steps * asked.batch_size)
settings = TrainingArguments(
    output_dir=str(Path(asked.out) / "checkpoints"),
    max_steps=asked.steps,
    per_device_train_batch_size=asked.batch_size,
    learning_rate=2e-3,
    logging_steps=1,
    remove_unused_columns=False,
    report_to=[],
)
trainer = Trainer(model, settings, train_dataset=samples, data_collator=collate)
trainer.train()
state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all processes
if trainer.args.should_save:
    atp_patch.save_pretrained(model, asked.out, state_dict=state)
