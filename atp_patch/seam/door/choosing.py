"""The choice at the decoder's door of the projected visual features that enter layer 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from atp_patch.contract import Decision, DoorView, TowerTokens
from atp_patch.maths import gather_tokens, pack
from atp_patch.seam.decoder.prefill import Prefill
from atp_patch.seam.host.prompt import Prompt


class Chooser(Protocol):
    """What the rest of the package says about the door."""

    minimum: dict[str, int]

    def door_counts(self, run: Prefill) -> tuple[int, ...] | None:
        """How many visual tokens of each sample enter, or None where the method decides."""

    def decide_at_door(self, view: DoorView) -> Decision:
        """The method's choice."""


def choose(
    run: Prefill,
    prompt: Prompt,
    pruner: Chooser,
    tower: Callable[[], Mapping[int, TowerTokens]],
    kwargs: dict[str, Any],
) -> None:
    """Let only those visual tokens enter the decoder that the method chooses.

    Args:
        run: a pass that has just begun.
        prompt: its tokens.
        pruner: what the rest of the package says about the door.
        tower: gives what the vision tower did.
        kwargs: the decoder's; features that it adds in later layers are narrowed in place.
    """
    decision = run.frozen_decision(0)
    if decision is None:
        counts = pruner.door_counts(run)
        if counts == run.left:
            return  # the budget keeps everything
        embeds = kwargs["inputs_embeds"]
        # Scores are compared with each other: no autocast rounds them.
        with torch.no_grad(), torch.autocast(embeds.device.type, enabled=False):
            view = _view(run, prompt, embeds, counts, tower(), pruner.minimum)
            decision = pruner.decide_at_door(view)
        decision = replace(decision, soft=decision.keep.float())
    run.choose_entry(decision)
    _narrow_late_features(run, kwargs)


def _view(
    run: Prefill,
    prompt: Prompt,
    embeds: Tensor,
    counts: tuple[int, ...] | None,
    tower: Mapping[int, TowerTokens],
    minimum: dict[str, int],
) -> DoorView:
    layout = run.layout
    position, valid = pack(prompt.attended & prompt.scored & ~prompt.visual)
    position, valid = position.to(embeds.device), valid.to(embeds.device)
    features = gather_tokens(embeds, layout.position)
    return DoorView(
        layout=layout,
        token=torch.arange(layout.valid.shape[1], device=embeds.device).expand_as(layout.valid),
        slot_valid=layout.valid,
        counts=counts,
        sample_key=run.text.sample_key,
        **minimum,
        features=features.masked_fill(~layout.valid[..., None], 0),
        text=gather_tokens(embeds, position).masked_fill(~valid[..., None], 0),
        text_valid=valid,
        text_position=position,
        tower=tower,
    )


def _narrow_late_features(run: Prefill, kwargs: dict[str, Any]) -> None:
    """Narrow the features that the host adds behind its first layers (deepstack).

    They are dropped and merged like the tokens that they belong to.
    """
    mask, late = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if mask is None or not late:
        return
    batch, length = mask.shape
    mask = mask.to(run.layout.position.device)
    survivors = run.entering(0)
    left = mask if survivors is None else mask.gather(1, survivors.index) & survivors.all_valid
    made = []
    for features in late:
        table = features.new_zeros(batch, length, features.shape[-1])
        table = table.masked_scatter(mask.to(features.device)[..., None], features)
        made.append(run.narrow_hidden(0, table)[left.to(features.device)])
    kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = left, made
