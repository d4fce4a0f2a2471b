"""One process of a training of three steps: `python parallel.py KIND LEARNS OUT` under torchrun.

KIND: one (the whole batch in one process), ddp (Accelerate) or fsdp2 (PyTorch's fully_shard, which
is what Accelerate calls; it refuses to do so without accelerators).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.core.test_learning import labelled, learner
from tests.helpers import inputs as made

STEPS = 3
# Answers and images of one size, so that the mean over processes is the mean over the batch.
PROMPTS = [
    made.prompt(made.Words(3), made.Image(6, 6), made.Words(9), seed=s) for s in range(4 * STEPS)
]


def main(kind: str, learns: str, out: str) -> None:
    """Train and, in the first process, save losses and what was learned."""
    torch.set_num_threads(1)
    model = learner("llava-llama", target_tokens=14, lambda_atp=0.3, lambda_target=0.0).train()
    for name, parameter in model.named_parameters():
        heads = name.startswith("atp_patch_heads.")
        parameter.requires_grad_(heads or (learns == "decoder" and "vision_tower" not in name))
    inner = model
    rank, size = 0, 1
    accelerator = Accelerator(cpu=True) if kind != "one" else None
    if accelerator is not None:
        rank, size = accelerator.process_index, accelerator.num_processes
        assert size == 2
    if kind == "fsdp2":
        for layer in model.get_decoder().layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if kind == "ddp":
        assert accelerator is not None
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(STEPS):
        share = PROMPTS[4 * step : 4 * step + 4][rank::size]
        loss = model(**labelled(inner, share)).loss
        optimizer.zero_grad()
        accelerator.backward(loss) if kind == "ddp" else loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        if size > 1:
            dist.all_reduce(whole)
        losses.append(float(whole) / size)
    learned = {n: full(p) for n, p in inner.named_parameters() if p.requires_grad}
    if rank == 0:
        torch.save({"losses": losses, "learned": learned}, out)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def full(parameter: Any) -> Tensor:
    """The whole of a parameter, gathered from its shards."""
    tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return tensor.detach().clone()


if __name__ == "__main__":
    main(*sys.argv[1:])
