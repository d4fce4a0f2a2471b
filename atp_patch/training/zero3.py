"""What the command does for DeepSpeed's ZeRO-3, which divides every parameter among processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from atp_patch.contract.errors import ConfigError

_GATHERS = "stage3_gather_16bit_weights_on_model_save"


def launched_with_deepspeed() -> bool:
    """Return whether ``accelerate launch`` was given a configuration with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_launcher() -> None:
    """Check that a launcher started this process: DeepSpeed finds its processes by the variables
    that torchrun sets.

    Raises:
        ConfigError: where no launcher has started this process.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "deepspeed: DeepSpeed needs a launcher, for one process too; start with: torchrun "
            "--nproc_per_node 2 -m atp_patch.train."
        )


def check_deepspeed(args: TrainingArguments) -> None:
    """Check what would otherwise fail during the training, or only after it.

    Raises:
        ConfigError: where Accelerate does not see all processes, or what is learned could not be
            put together to be saved.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.world_size != processes:
        raise ConfigError(
            f"deepspeed: Accelerate sees {args.world_size} of {processes} processes: it starts "
            "DeepSpeed's on accelerators alone. On CPUs leave deepspeed out: torchrun then trains "
            "with DDP."
        )
    zero = plugin.hf_ds_config.config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get(_GATHERS):
        raise ConfigError(
            "deepspeed: what ZeRO-3 has learned is saved whole; set zero_optimization: "
            f"{_GATHERS}: true in the configuration."
        )


@contextmanager
def whole_model(args: TrainingArguments) -> Iterator[None]:
    """Let transformers build whole models inside this context, although ZeRO-3 is on.

    Patching reads and sets parameters, so they must be whole then. DeepSpeed divides them among the
    processes when the training starts.
    """
    config: Any = getattr(args, "hf_deepspeed_config", None)
    config = config or getattr(args.deepspeed_plugin, "dschf", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)
