"""Finding the patch of a model, from what is around the model and from what is inside it.

The patch is an attribute of the decoder, the module whose layers carry the hooks. Every wrapper
holds the decoder somewhere inside, and so do the model without its head and the language model:
whoever is asked, the same patch is found. Copies and pickles take it along.
"""

from __future__ import annotations

from torch import nn

from atp_patch.contract.errors import ConfigError
from atp_patch.patching.patch import Patch

STATE = "_atp_patch"


def attached(module: object) -> Patch | None:
    """The patch on the model that a module is, wraps, or is a part of; None if there is none.

    Args:
        module: a model, a wrapper around one, the model without its head, or the language model.

    Raises:
        ConfigError: where the module holds several patched models.
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
    """Keep a patch where :func:`attached` looks for it."""
    vars(patch.parts.decoder)[STATE] = patch


def detach(patch: Patch) -> None:
    """Take a patch away from where :func:`attach` put it."""
    del vars(patch.parts.decoder)[STATE]


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The model inside its wrappers, and the wrappers, the outermost first.

    Wrappers are those of PEFT, torch.compile, and DistributedDataParallel, FullyShardedDataParallel
    and the like, told apart by their attributes.
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
    """Raise ConfigError where what a patch would learn comes too late to be trained in parallel.

    Data-parallel wrappers average the gradients of those parameters that they find when they are
    made: each process would train thresholds of its own.
    """
    for module in (*around, model):
        if hasattr(module, "module") or hasattr(module, "set_requires_gradient_sync"):
            raise ConfigError(
                f"{type(module).__name__} would not train what this patch adds, for it was made "
                "before: patch the model first, then wrap it."
            )
