"""Saving what a patched model was given and what it learned, and pushing it to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from atp_patch.patching.adapter import Adapter, Beside, adapter_of
from atp_patch.patching.api import require_patch
from atp_patch.patching.patch import HEADS


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write the adapter alone (configuration, learned tensors, card) to a folder.

    Args:
        folder: of its own: one that holds a model is refused.
        state_dict: of the whole model, where processes hold it in parts (FSDP, ZeRO-3):
            ``accelerator.get_state_dict(model)``, which all of them call.
        kwargs: passed on to ``huggingface_hub.ModelHubMixin.save_pretrained``.

    Raises:
        ConfigError: where the folder holds something else or cannot be written to.
        WeightsError: where this process holds a part of what was learned, or ``state_dict`` does,
            and where what was learned is NaN, infinite or absurdly large.
        HubError: where it was to be pushed as well, and was refused.
    """
    adapter(model, state_dict).save_pretrained(folder, **kwargs)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> str:
    """Push the adapter alone to a repository of its own; returns the address of the commit.

    Args:
        state_dict: as :func:`save_pretrained` takes it.
        kwargs: passed on to ``huggingface_hub.ModelHubMixin.push_to_hub`` (private, token, ...).

    Raises:
        HubError: where the Hub refuses it (no token, no right to write, a wrong name) or cannot be
            reached.
        WeightsError: as :func:`save_pretrained`.
    """
    return adapter(model, state_dict).push_to_hub(repo_id, **kwargs)


def adapter(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    beside: Beside | None = None,
) -> Adapter:
    """What :func:`save_pretrained` writes.

    Args:
        state_dict: as that takes it; ``beside`` as
            :class:`~atp_patch.patching.adapter.Adapter` does.
    """
    patch, found = require_patch(model), f".{HEADS}."
    patch.check_heads()
    if state_dict is not None:  # wrappers put their own names before the model's
        names = {f".{name}".partition(found)[2]: name for name in state_dict}
        state_dict = {own: state_dict[name] for own, name in names.items() if own}
    return adapter_of(patch.config, patch.heads, state_dict, beside)
