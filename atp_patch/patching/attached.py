"""Finding the patch of a model, from a wrapper around the model or from a part of it.

The patch is an attribute of the decoder, the module whose layers carry the hooks. Every wrapper
contains the decoder, and so do the model without its head and the language model, so the same patch
is found from each of them. Copies and pickles of the model contain it too.
"""

from __future__ import annotations

from torch import nn

from atp_patch.contract.errors import ConfigError
from atp_patch.patching.patch import Patch

STATE = "_atp_patch"


def attached(module: object) -> Patch | None:
    """Return the patch of the model that a module is, wraps, or is a part of, or None.

    Args:
        module: a model, a wrapper around one, the model without its head, or the language model.

    Raises:
        ConfigError: if the module contains several patched models.
    """
    if not isinstance(module, nn.Module):
        return None
    found = [patch for part in module.modules() if (patch := vars(part).get(STATE)) is not None]
    if len(found) > 1:
        raise ConfigError(
            f"this {type(module).__name__} holds {len(found)} patched models; give one of them."
        )
    return found[0] if found else None


def attach(patch: Patch) -> None:
    """Store a patch where :func:`attached` finds it."""
    vars(patch.parts.decoder)[STATE] = patch


def detach(patch: Patch) -> None:
    """Remove a patch that :func:`attach` stored."""
    del vars(patch.parts.decoder)[STATE]


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """Return the model inside its wrappers, and the wrappers from the outermost to the innermost.

    The wrappers are those of PEFT, torch.compile, DistributedDataParallel,
    FullyShardedDataParallel and similar ones. They are recognised by their attributes.
    """
    around: list[nn.Module] = []
    while (inner := _inside(model)) is not None:
        around.append(model)
        model = inner
    return model, tuple(around)


def _inside(model: nn.Module) -> nn.Module | None:
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return inner
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else None
    return inner if isinstance(inner, nn.Module) else None


def check_gradients_are_shared(model: nn.Module, around: tuple[nn.Module, ...]) -> None:
    """Raise ConfigError if learned weights would be added to an existing data-parallel wrapper.

    Such a wrapper averages the gradients only of the parameters that exist when it is made, so each
    process would train different thresholds.
    """
    for module in (*around, model):
        if hasattr(module, "module") or hasattr(module, "set_requires_gradient_sync"):
            raise ConfigError(
                f"{type(module).__name__} would not train what this patch adds, since it was made "
                "before: patch the model first, then wrap it."
            )
