"""Writing a converted checkpoint as a folder that is complete, or not there at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from atp_patch.contract.errors import ConfigError
from atp_patch.convert.plan import Plan
from atp_patch.scratch import scratch_folder
from atp_patch.tools.command_line import progress_bar
from atp_patch.tools.loading import first_line

SHARD_BYTES = 2**30


def write(plan: Plan, out: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a conversion to a new folder.

    Memory holds one shard and one tensor at a time, and the shard twice while it is written.

    Returns:
        The size of the weights in bytes.

    Raises:
        WeightsError: where the tensors are not those of the new model.
        ConfigError: where the folder is there already or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; give a folder that is new or empty.")
    found = plan.check()
    plan.config.architectures = [plan.architecture.__name__]
    plan.config.dtype = plan.dtype(found)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(out.absolute()) as scratch:
            _write_weights(plan, found, scratch, shard_bytes)
            plan.config.save_pretrained(scratch)
            plan.save_more(scratch)
            if out.exists():
                out.rmdir()
            scratch.rename(out)
    except (OSError, SafetensorError) as error:  # safetensors raises its own on a full disk
        raise ConfigError(f"{out} cannot be written ({first_line(error)}).") from error
    return sum(map(_bytes, found.values()))


def _write_weights(plan: Plan, found: Mapping[str, Tensor], folder: Path, limit: int) -> None:
    """Write one shard after the other, and then their index."""
    shards = _shards(found, limit)
    files = [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        if len(shards) > 1
        else "model.safetensors"
        for i in range(len(shards))
    ]
    tensors = plan.tensors(plan.dtype(found))
    with progress_bar("tensors", len(found)) as advance:
        for names, file in zip(shards, files, strict=True):
            # A part of a tensor is copied, so that it does not keep the whole one in memory.
            shard = {name: tensor.clone() for name, tensor in (next(tensors) for _ in names)}
            assert list(shard) == names
            save_file(shard, folder / file, metadata={"format": "pt"})
            advance(len(names))
    if len(shards) > 1:
        where = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        index = {
            "metadata": {"total_size": sum(map(_bytes, found.values()))},
            "weight_map": where,
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(found: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Return the names in each shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in found.items():
        if shards[-1] and size + _bytes(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * torch.empty((), dtype=tensor.dtype).element_size()
