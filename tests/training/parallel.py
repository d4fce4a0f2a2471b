"""One process of a training of three steps: `python parallel.py KIND LEARNS OUT` under torchrun.

KIND: one (the whole batch in one process), ddp (Accelerate), fsdp2 (PyTorch's fully_shard, which is
what Accelerate calls; it refuses to do so without accelerators) or zero3 (Accelerate's DeepSpeed).
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import atp_patch
from atp_patch.contract.errors import WeightsError
from tests.core.test_learning import labelled, learner
from tests.helpers import inputs as made
from tests.training.deepspeed_on_cpus import deepspeed_on_cpus

STEPS = 3
ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # where none is given, DeepSpeed clips at 1
    "zero_allow_untested_optimizer": True,
    # nothing is small enough to stay whole
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
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
    accelerator = None
    if kind == "zero3":
        deepspeed_on_cpus()
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ZERO3))
    elif kind != "one":
        accelerator = Accelerator(cpu=True)
    if accelerator is not None:
        rank, size = accelerator.process_index, accelerator.num_processes
        assert size == 2
    if kind == "fsdp2":
        for layer in model.get_decoder().layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if kind in ("ddp", "zero3"):
        assert accelerator is not None
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(STEPS):
        share = PROMPTS[4 * step : 4 * step + 4][rank::size]
        loss = model(**labelled(inner, share)).loss
        optimizer.zero_grad()
        accelerator.backward(loss) if kind in ("ddp", "zero3") else loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        if size > 1:
            dist.all_reduce(whole)
        losses.append(float(whole) / size)
    learned = {n: full(p) for n, p in inner.named_parameters() if p.requires_grad}
    if kind in ("fsdp2", "zero3"):
        with pytest.raises(WeightsError, match="over processes"):
            atp_patch.save_pretrained(inner, f"{out}.adapter")
    state = whole_state(kind, model, accelerator)
    if rank == 0:
        torch.save({"losses": losses, "learned": learned}, out)
        atp_patch.save_pretrained(inner, f"{out}.adapter", state_dict=state)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def whole_state(kind: str, model: Any, accelerator: Any) -> Any:
    """The state dict of all processes, as Accelerate makes it."""
    if kind == "fsdp2":  # where Accelerate would call this itself
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options)
    return model.state_dict() if accelerator is None else accelerator.get_state_dict(model)


def full(parameter: Any) -> Tensor:
    """The whole of a parameter, gathered from its shards."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return tensor.detach().clone()


if __name__ == "__main__":
    main(*sys.argv[1:])
