"""The same loop on Accelerate: one process, several, or several machines.

accelerate launch --config_file examples/accelerate/ddp.yaml examples/trainers/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from scenes import arguments, dataset, load
from torch.utils.data import DataLoader

import atp_patch

asked = arguments()
accelerator = Accelerator()
model, processor = load(asked)
samples, collate = dataset(model, processor, asked.steps * asked.batch_size)
loader = DataLoader(samples, asked.batch_size, collate_fn=collate)
optimizer = torch.optim.AdamW(atp_patch.parameter_groups(model, atp_lr=2e-3, atp_bias_lr=2e-2))
patched, optimizer, loader = accelerator.prepare(model, optimizer, loader)

patched.train()
for step, batch in enumerate(loader, 1):
    loss = patched(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    tokens = atp_patch.last_trace(model).average_tokens
    accelerator.print(f"step {step}  loss {loss.item():.4f}  tokens {tokens:.1f}")
state = accelerator.get_state_dict(patched)  # of all processes, where each holds a part
if accelerator.is_main_process:
    atp_patch.save_pretrained(model, asked.out, state_dict=state)
