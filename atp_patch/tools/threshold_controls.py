"""Thresholds that do not adapt to the instance, with which learned ones are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from atp_patch.contract.errors import ConfigError
from atp_patch.methods.atp_given import GivenThresholds
from atp_patch.methods.atp_heads import Thresholds
from atp_patch.patching.api import require_patch
from atp_patch.patching.evaluating import evaluating
from atp_patch.patching.patch import Patch
from atp_patch.tools.observation import Batch, learned_thresholds, meet_count, observe

CONTROLS = ("mean", "shuffled")


def threshold_control(model: nn.Module, batches: Iterable[Batch], kind: str) -> GivenThresholds:
    """Make thresholds that do not adapt to the instance, for :func:`controlled`.

    At every pruning layer they keep as many tokens of the data on average as the model's own
    thresholds do. If an adaptive method is no better with its own, it has learned nothing about
    single instances.

    Args:
        model: as in :func:`atp_patch.calibrate`.
        batches: as in :func:`atp_patch.calibrate`.
        kind: "mean": every instance gets the data's mean thresholds; "shuffled": every instance
            gets those of another one, drawn from the data.

    Raises:
        ConfigError: for another kind, or where the patch has no learned thresholds.
        InputError: where the data has no images.
    """
    if kind not in CONTROLS:
        raise ConfigError(f"kind={kind!r} is not one of {', '.join(CONTROLS)}.")
    patch, data = require_patch(model), list(batches)
    _adaptive(patch)
    with evaluating(model):
        own = observe(model, data, None)
        tables = own.thetas
        if kind == "mean":
            tables = {layer: table.mean(0, keepdim=True) for layer, table in tables.items()}
        logits = {layer: torch.logit(table, eps=1e-6).float() for layer, table in tables.items()}
        control = GivenThresholds(logits)
        with controlled(model, control):
            for layer, wanted in own.counts.items():
                meet_count(model, data, control, layer, wanted)
    return control


@contextmanager
def controlled(model: nn.Module, control: GivenThresholds) -> Iterator[None]:
    """Replace a model's thresholds by a control inside this context and in this thread.

    Adapters that are saved meanwhile contain the model's own thresholds.

    Args:
        model: as in :func:`atp_patch.calibrate`.
        control: what :func:`threshold_control` made of this patch.

    Raises:
        ConfigError: where the control belongs to other layers, or the thresholds are not ATP's.
    """
    patch = require_patch(model)
    _adaptive(patch)
    if control.layers != patch.layers:
        raise ConfigError(
            f"these thresholds are for layers {list(control.layers)}, the model prunes before "
            f"{list(patch.layers)}; make them from this patch."
        )
    thread = patch.thread
    before, thread.control = thread.control, control
    try:
        yield
    finally:
        thread.control = before


def _adaptive(patch: Patch) -> None:
    """Refuse thresholds that are not ATP's, because there are no controls for others."""
    if not isinstance(learned_thresholds(patch), Thresholds):
        raise ConfigError(
            f"there are controls for the learned thresholds of atp, not for those of "
            f"{patch.config.name}."
        )
