"""The choice at the decoder's door of the projected visual features that enter layer 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from atp_patch.contract import Decision, DoorView, Layout, TowerTokens
from atp_patch.maths import gather_tokens, pack
from atp_patch.seam.decoder.prefill import Prefill
from atp_patch.seam.decoder.visual_tokens import VisualTokens
from atp_patch.seam.host.prompt import Prompt


class DoorPolicy(Protocol):
    """What the rest of the package says about the door.

    Attributes:
        chooses_at_door: True where a method chooses there.
        view_minimums: the fields of a view that say how many tokens are kept at least, by name.
    """

    chooses_at_door: bool
    view_minimums: dict[str, int]

    def door_counts(self, layout: Layout) -> tuple[int, ...] | None:
        """Return how many visual tokens of each sample enter, or None where the method decides."""

    def decide_at_door(self, view: DoorView) -> Decision:
        """Ask the method for its decision."""


def choose(
    policy: DoorPolicy,
    layout: Layout,
    prompt: Prompt,
    sample_key: Tensor,
    embeds: Tensor,
    tower: Callable[[], Mapping[float, TowerTokens]],
) -> Decision | None:
    """Return the visual tokens that enter the decoder, or None where the budget lets all enter.

    Args:
        policy: what the rest of the package says about the door.
        layout: the visual tokens of the pass.
        prompt: all tokens of the pass.
        sample_key: (B,) int64 as in a view.
        embeds: (B, L, D), what is about to enter the decoder.
        tower: gives what the vision tower did.
    """
    counts = policy.door_counts(layout)
    if counts == layout.totals:
        return None
    position, valid = pack(prompt.attended & prompt.scored & ~prompt.visual)
    ids = None if prompt.ids is None else prompt.ids.gather(1, position).to(embeds.device)
    position, valid = position.to(embeds.device), valid.to(embeds.device)
    tokens = VisualTokens.all_of(layout)
    # Scores are compared with each other, so autocast must not round them.
    with torch.no_grad(), torch.autocast(embeds.device.type, enabled=False):
        features = gather_tokens(embeds, layout.position)
        view = DoorView(
            layout=layout,
            token=tokens.token,
            slot_valid=tokens.valid,
            counts=counts,
            sample_key=sample_key,
            **policy.view_minimums,
            features=features.masked_fill(~layout.valid[..., None], 0),
            text=gather_tokens(embeds, position).masked_fill(~valid[..., None], 0),
            text_valid=valid,
            text_position=position,
            text_ids=ids,
            relevance=None,
            tower=tower(),
        )
        decision = policy.decide_at_door(view)
    return replace(decision, soft=decision.keep.float())


def narrow_late_features(prefill: Prefill, kwargs: dict[str, Any]) -> None:
    """Narrow the features that the host adds behind its first layers (deepstack).

    They are dropped and merged like the tokens that they belong to.

    Args:
        prefill: a pass whose entry has been chosen.
        kwargs: the decoder's arguments, which are changed in place.
    """
    mask, late = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if mask is None or not late:
        return
    batch, length = mask.shape
    mask = mask.to(prefill.layout.position.device)
    survivors = prefill.tokens.entering(0)
    left = mask if survivors is None else mask.gather(1, survivors.index) & survivors.all_valid
    made = []
    for features in late:
        table = features.new_zeros(batch, length, features.shape[-1])
        table = table.masked_scatter(mask.to(features.device)[..., None], features)
        table = prefill.tokens.narrow_hidden(0, prefill.tokens.merged(0, table))
        made.append(table[left.to(features.device)])
    kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = left, made
