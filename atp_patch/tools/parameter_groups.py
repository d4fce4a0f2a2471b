"""Which parameters learn, and how fast: threshold heads, the language model, or LoRA."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.patching.api import require_patch
from atp_patch.patching.patch import MODULE_NAME

_PREFIX = MODULE_NAME + "."


def parameter_groups(
    model: nn.Module, lr: float = 2e-5, atp_lr: float = 1e-4, atp_bias_lr: float | None = None
) -> list[dict[str, Any]]:
    """Make parameter groups for an optimizer, in which the threshold heads learn faster than the
    model.

    The defaults are those of ATP-LLaVA (Ye et al., 2024). Each parameter with ``requires_grad`` is
    in one group, and no other parameter is in any.

    Args:
        model: a patched model with learned thresholds.
        lr: learning rate of the model.
        atp_lr: learning rate of the heads.
        atp_bias_lr: learning rate of the thresholds' own biases, which move all thresholds of a
            layer together; ``atp_lr`` if None.

    Returns:
        Groups with "params", "lr" and "name" ("model", "atp" and "atp_bias").

    Raises:
        NotPatchedError: if the model is not patched.
        ConfigError: if its thresholds are not learned, or nothing has ``requires_grad``.
    """
    heads = require_patch(model).learned_module
    if heads is None:
        raise ConfigError(
            'this patch learns nothing; patch with method="atp", thresholds="learned".'
        )
    learned = set(heads.parameters())  # found by identity, because wrappers change their names
    rates = {"model": lr, "atp": atp_lr, "atp_bias": atp_lr if atp_bias_lr is None else atp_bias_lr}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = "model"
        if parameter in learned:
            bias = name.endswith("bias") and parameter.numel() == 1 and atp_bias_lr is not None
            group = "atp_bias" if bias else "atp"
        members[group].append(parameter)
    if not any(members.values()):
        raise ConfigError("no parameter of the model has requires_grad: nothing would learn.")
    return [
        {"params": parameters, "lr": rates[name], "name": name}
        for name, parameters in members.items()
        if parameters
    ]


def freeze(model: Any, freeze_lm: bool) -> None:
    """Let the heads learn, and the language model and the projector too unless ``freeze_lm``.

    The vision tower never learns, as in LLaVA-1.5's instruction tuning. Where a family has its
    projector inside the tower (Qwen2-VL's merger), the projector does not learn either.

    Raises:
        UnsupportedModelError: where the model does not say which part is its vision tower.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(_PREFIX) or not freeze_lm)
    if freeze_lm:
        return
    tower = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else model
    if tower is model or tower is require_patch(model).parts.base:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say which part is its vision tower; train with "
            "freeze_lm, or set requires_grad yourself and use a Trainer."
        )
    tower.requires_grad_(False)


def add_lora(model: Any, rank: int, alpha: float, leave_out: Collection[int] = ()) -> None:
    """Add LoRA (Hu et al., 2021) to every linear layer of the decoder; the heads learn beside it.

    It is added inside the model (``model.add_adapter``), because wrappers of PEFT before 0.21 may
    call ``forward`` without the hooks that prune, and all wrappers freeze the heads. Everything
    that learns becomes float32, because small steps would be lost in bfloat16.

    Args:
        model: a patched model of transformers.
        rank: the rank of the two factors.
        alpha: LoRA's scale; what it adds is multiplied by alpha / rank.
        leave_out: numbers of decoder layers that get none.

    Raises:
        ConfigError: where PEFT is not installed.
        UnsupportedModelError: where the model cannot carry adapters.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            f"LoRA needs PEFT ({error}); install it with: pip install 'atp-patch[train]'."
        ) from error
    if not hasattr(model, "add_adapter"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no add_adapter; LoRA needs a transformers model."
        )
    layers = require_patch(model).parts.layers
    chosen = [layer for number, layer in enumerate(layers) if number not in leave_out]
    inside = {id(m) for layer in chosen for m in layer.modules() if isinstance(m, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in inside]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    model.add_adapter(config)
    if Path(config.base_model_name_or_path or "").is_dir():
        config.base_model_name_or_path = None  # the path of a local folder is not for publishing
    for name, parameter in model.named_parameters():  # PEFT has frozen all parameters but its own
        if name.startswith(_PREFIX):
            parameter.requires_grad_(True)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
