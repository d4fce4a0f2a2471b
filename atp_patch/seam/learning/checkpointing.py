"""Kinds of gradient checkpointing in which thresholds cannot learn."""

from __future__ import annotations

from typing import Any

from atp_patch.contract.errors import UnsupportedModelError


def check_checkpointing(layer: Any) -> None:
    """Raise for reentrant gradient checkpointing, which loses what the thresholds learn from.

    Raises:
        UnsupportedModelError: naming the call that turns it off.
    """
    function = getattr(layer, "_gradient_checkpointing_func", None)
    active = getattr(layer, "gradient_checkpointing", False)
    if active and getattr(function, "keywords", {}).get("use_reentrant", False):
        raise UnsupportedModelError(
            "reentrant gradient checkpointing gives the thresholds wrong gradients; call "
            "model.gradient_checkpointing_enable({'use_reentrant': False})."
        )
