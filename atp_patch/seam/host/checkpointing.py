"""Checking gradient checkpointing for what a patched model cannot do with it."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from atp_patch.contract.errors import CacheError, UnsupportedModelError


def check_learning(layer: Any) -> None:
    """Refuse reentrant gradient checkpointing, which loses what the thresholds learn from.

    Args:
        layer: a layer of the decoder.

    Raises:
        UnsupportedModelError: where the layer uses it; the message names the call that ends this.
    """
    if getattr(layer, "gradient_checkpointing", False) and _is_reentrant(layer):
        raise UnsupportedModelError(
            "reentrant gradient checkpointing, which is torch's default where use_reentrant is not "
            "given, gives the thresholds wrong gradients; call "
            "model.gradient_checkpointing_enable({'use_reentrant': False}) before training "
            "(peft.prepare_model_for_kbit_training takes gradient_checkpointing_kwargs="
            "{'use_reentrant': False})."
        )


def check_generation(layer: Any, cache: Cache | None) -> None:
    """Refuse to generate where the host's layers leave their cache empty.

    The host would go on from the last token alone, without its prompt.

    Args:
        layer: a layer of the decoder.
        cache: the cache that ``generate`` gives to the decoder, or None.

    Raises:
        CacheError: where it stays empty; the message names the calls that mend this.
    """
    checkpoints = getattr(layer, "gradient_checkpointing", False) and layer.training
    if (
        cache is not None
        and checkpoints
        and not getattr(layer, "_can_checkpoint_with_cache", False)
    ):
        raise CacheError(
            "gradient checkpointing in training mode fills no cache, so that generate would forget "
            "its prompt; call model.eval() or model.gradient_checkpointing_disable() first, or "
            "generate with use_cache=False."
        )


def _is_reentrant(layer: Any) -> bool:
    function = getattr(layer, "_gradient_checkpointing_func", None)
    given = getattr(function, "keywords", {}).get("use_reentrant")
    if given is not None:
        return bool(given)
    return getattr(function, "func", function) is checkpoint
