"""What a patched model holds, apart from what single threads hold."""

from __future__ import annotations

import threading
from typing import Any

from atp_patch.patching.api import require_patch


def parts_of_a_patch(model: Any) -> dict[str, Any]:
    """By name: the modules with their configs, and what patching has put behind their hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = module
        if hasattr(module, "config"):
            found[f"{name}.config"] = module.config
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for number, hook in enumerate(hooks):
            owner = getattr(hook, "__self__", hook)
            if type(owner).__module__.startswith("atp_patch"):
                found[f"{name} {number}"] = owner
    patch = require_patch(model)
    found["patch"], found["seam"] = patch, patch.seam
    for name, part in vars(patch.seam).items():
        if type(part).__module__.startswith("atp_patch"):
            found[f"seam.{name}"] = part
    return found


def held(model: Any) -> dict[str, dict[str, Any]]:
    """Attribute -> identity or printed value, of every such part; that of threads left out."""
    return {
        name: {
            key: repr(value) if isinstance(value, (list, dict, set, tuple, int, float)) else value
            for key, value in vars(part).items()
            if not isinstance(value, threading.local) and key != "rope_deltas"
        }
        for name, part in parts_of_a_patch(model).items()
        if hasattr(part, "__dict__") and not isinstance(part, threading.local)
    }
