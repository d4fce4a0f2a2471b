"""LoRA that was trained beside an adapter, merged into the model while that is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_patch.errors import ConfigError, WeightsError

_PREFIX, _UP, _DOWN = "base_model.model.", ".lora_B.weight", ".lora_A.weight"
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")


@contextmanager
def merged(model: Any, folder: str | None) -> Iterator[None]:
    """The model with the LoRA of a folder added to its weights; exactly as before afterwards.

    Args:
        folder: what PEFT, or ``save_pretrained`` of a model with LoRA, wrote; None adds nothing.

    Raises:
        ConfigError: where PEFT is not installed.
        WeightsError: where the folder holds no plain LoRA, or that of another model.
    """
    if folder is None:
        yield
        return
    before: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    try:
        with torch.no_grad():
            for name, delta in _deltas(folder).items():
                weight = getattr(modules.get(name), "weight", None)
                if weight is None or weight.shape != delta.shape:
                    raise WeightsError(f"{folder} was made for another model: it changes {name}.")
                before[name] = weight.detach().clone()
                weight.add_(delta.to(weight))
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                modules[name].weight.copy_(weight)


@lru_cache(maxsize=8)
def _deltas(folder: str) -> dict[str, Tensor]:
    """Name of a linear layer -> what LoRA adds to its weight."""
    try:
        from peft import LoraConfig, PeftConfig
    except ImportError as error:
        raise ConfigError(
            f"LoRA needs PEFT ({error}); install it with: pip install 'atp-patch[train]'."
        ) from error
    from safetensors.torch import load_file

    missing = [name for name in LORA_FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise WeightsError(f"{folder} holds no LoRA: {' and '.join(missing)} missing.")
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig) or any(
        (config.use_dora, config.fan_in_fan_out, config.rank_pattern, config.alpha_pattern)
    ):
        raise WeightsError(f"{folder} is no plain LoRA; merge it into the model and give --model.")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    stored = load_file(Path(folder) / LORA_FILES[1])
    return {
        name.removeprefix(_PREFIX).removesuffix(_UP): scale
        * (up.float() @ stored[name.removesuffix(_UP) + _DOWN].float())
        for name, up in stored.items()
        if name.endswith(_UP)
    }
