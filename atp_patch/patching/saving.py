"""Saving the configuration and learned weights of a patched model, and pushing them to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from atp_patch.patching.adapter import Adapter, adapter_of
from atp_patch.patching.adapter_card import Beside
from atp_patch.patching.api import require_patch
from atp_patch.patching.made_with import MadeWith
from atp_patch.patching.patch import MODULE_NAME


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write the adapter (configuration, learned weights, card) to a folder, without the model.

    Args:
        model: a patched model.
        folder: the folder; one that holds a model is refused.
        state_dict: the state dict of the whole model if each process holds only a part of it (FSDP,
            ZeRO-3): ``accelerator.get_state_dict(model)``, which all processes must call.
        kwargs: passed to ``huggingface_hub.ModelHubMixin.save_pretrained``.

    Raises:
        ConfigError: if the folder holds something else or cannot be written to.
        WeightsError: if this process or ``state_dict`` holds only a part of the learned weights, or
            if one of them is NaN, infinite or absurdly large.
        HubError: if the adapter should also be pushed and the push was refused.
    """
    adapter(model, state_dict).save_pretrained(folder, **kwargs)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> str:
    """Push the adapter to a repository on the Hub, without the model.

    Args:
        model: a patched model.
        repo_id: name of the repository, USER/REPOSITORY.
        state_dict: as in :func:`save_pretrained`.
        kwargs: passed to ``huggingface_hub.ModelHubMixin.push_to_hub`` (private, token, ...).

    Returns:
        The address of the commit.

    Raises:
        HubError: if the Hub refuses the push (no token, no right to write, a wrong name) or cannot
            be reached.
        WeightsError: as in :func:`save_pretrained`.
    """
    return adapter(model, state_dict).push_to_hub(repo_id, **kwargs)


def adapter(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    beside: Beside | None = None,
) -> Adapter:
    """Make the adapter that :func:`save_pretrained` writes.

    Args:
        model: a patched model.
        state_dict: as in :func:`save_pretrained`.
        beside: as in :class:`~atp_patch.patching.adapter.Adapter`.
    """
    patch, found = require_patch(model), f".{MODULE_NAME}."
    patch.check_module_trains()
    if state_dict is not None:  # wrappers put their own names before the model's
        names = {f".{name}".partition(found)[2]: name for name in state_dict}
        state_dict = {own: state_dict[name] for own, name in names.items() if own}
    made_with = MadeWith.of(patch.parts.model, patch.parts.decoder)
    return adapter_of(patch.config, made_with, patch.learned_module, state_dict, beside)
