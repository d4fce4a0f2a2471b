"""Thresholds learn in a bare loop of torch: the model's loss holds their terms already."""

from __future__ import annotations

import torch
from scenes import arguments, dataset, load
from torch.utils.data import DataLoader

import atp_patch

asked = arguments()
model, processor = load(asked)
samples, collate = dataset(model, processor, asked.steps * asked.batch_size)
loader = DataLoader(samples, asked.batch_size, collate_fn=collate)
optimizer = torch.optim.AdamW(atp_patch.parameter_groups(model, atp_lr=2e-3, atp_bias_lr=2e-2))

model.train()
for step, batch in enumerate(loader, 1):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    tokens = atp_patch.last_trace(model).average_tokens
    print(f"step {step}  loss {loss.item():.4f}  tokens {tokens:.1f}")
atp_patch.save_pretrained(model, asked.out)
