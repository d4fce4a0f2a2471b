"""The choice among the features of pictures: what ``patch_model`` does at the decoder's door.

The methods are the same as there, and see the same: each picture is a sample of its own, without
text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from atp_patch.contract import (
    DoorMethod,
    DoorView,
    Layout,
    TokenGroups,
    TowerMethod,
    TowerTokens,
)
from atp_patch.contract.before_decoder import check_merge
from atp_patch.contract.decision import check_decision
from atp_patch.contract.errors import InputError
from atp_patch.integrations.vllm.picture import Picture
from atp_patch.integrations.vllm.settings import Settings
from atp_patch.maths import even_counts, gather_tokens, pack, scatter_tokens
from atp_patch.seam import VisualTokens
from atp_patch.seam.decoder.visual_tokens import Choice


class Kept(NamedTuple):
    """What is left of one picture.

    Attributes:
        features: (m, D), the features that enter the decoder, in the order of the picture.
        place: (m,) int64, their places among the picture's tokens.
    """

    features: Tensor
    place: Tensor


def keep_features(
    settings: Settings,
    features: Sequence[Tensor],
    pictures: Sequence[Picture],
    tower: Mapping[float, TowerTokens] | None = None,
    *,
    width: int | None = None,
) -> list[Kept]:
    """Let a door method choose among the features of pictures, and merge what it merges.

    Args:
        settings: the door method and the budget.
        features: for each picture, (n, D) projected features, one for each of its tokens.
        pictures: how the tokens of each picture lie.
        tower: what the vision tower did, by the numbers in the method's ``tower_blocks``; a picture
            is a sample.
        width: how many of the D channels the method sees; by default all. The others are dropped
            and merged like these.

    Raises:
        InputError: if features are NaN or infinite.
        DecisionError: if the method's decision is not valid.
    """
    method = settings.method
    assert isinstance(method, DoorMethod), "methods on the tower merge before features are made"
    totals = tuple(picture.prunable for picture in pictures)
    counts = tuple(map(settings.count, totals))
    if counts == totals:
        return [Kept(one, torch.arange(len(one), device=one.device)) for one in features]
    every = pad_sequence(list(features), batch_first=True)
    layout = Layout.from_grids([one.grids for one in pictures], every.shape[1], every.device)
    view = _view(every[..., :width], layout, counts, tower)
    if not bool(view.features.isfinite().all()):
        raise InputError(
            "a picture's features are NaN or infinite, and nothing can be chosen by them; a model "
            "in float16 may overflow: serve it with --dtype bfloat16 or float32."
        )
    decision = check_decision(method.decide(view), view, method.name)
    keep = decision.keep & view.slot_valid
    table = Choice(decision, VisualTokens.all_of(layout), layout.position, counts, None).merged(
        every
    )
    lengths = torch.tensor([picture.length for picture in pictures], device=every.device)
    between = (torch.arange(layout.length, device=every.device) < lengths[:, None]) & ~layout.mask
    stays = between | scatter_tokens(keep, layout.position, keep, layout.length)
    index, valid = pack(stays)
    chosen = gather_tokens(table, index)
    return [
        Kept(row[used], place[used]) for row, place, used in zip(chosen, index, valid, strict=True)
    ]


def _view(
    features: Tensor,
    layout: Layout,
    counts: tuple[int, ...],
    tower: Mapping[float, TowerTokens] | None,
) -> DoorView:
    """What a door method sees of pictures alone.

    Args:
        features: (B, L, D) the features of all tokens of each picture.
        layout: where the tokens are that may go.
        counts: for each picture, how many of these stay.
        tower: what the vision tower did.
    """
    tokens = VisualTokens.all_of(layout)
    prunable = gather_tokens(features, layout.position)
    none = tokens.token[:, :0]
    return DoorView(
        layout=layout,
        token=tokens.token,
        slot_valid=tokens.valid,
        counts=counts,
        sample_key=torch.zeros(len(features), dtype=torch.long, device=features.device),
        features=prunable.masked_fill(~tokens.valid[..., None], 0),
        text=features[:, :0],
        text_valid=none.bool(),
        text_position=none,
        tower=tower or {},
    )


def tile_counts(settings: Settings, pictures: Sequence[Picture]) -> tuple[int, ...]:
    """For each tile of each picture, how many of its tokens stay."""
    found: list[int] = []
    for picture in pictures:
        sizes = [grid.length for grid in picture.grids]
        found += even_counts(settings.count(picture.prunable), sizes, 0)
    return tuple(found)


def merge_features(
    settings: Settings, groups: TokenGroups, features: Tensor, pictures: Sequence[Picture]
) -> list[Kept]:
    """Let a tower method choose among the tower's tokens, and merge what it merges.

    Args:
        settings: the tower method and the budget.
        groups: the tokens of each tile, in reading order, with the counts of :func:`tile_counts`.
        features: (G, n, Dt) the projector's inputs or outputs of the same tokens.
        pictures: how the tokens of each picture lie; each of its grids is one group.

    Raises:
        DecisionError: if the method's merge is not valid.
    """
    method = settings.method
    assert isinstance(method, TowerMethod), "methods at the door choose after the projector"
    merge = check_merge(method.merge(groups), groups, method.name)
    made = (merge.weight @ features.float()).to(features.dtype)
    table = torch.where(merge.changed[..., None], made, gather_tokens(features, merge.index))
    tiles = zip(table, merge.index, merge.keep.sum(1).tolist(), strict=True)
    found = []
    for picture in pictures:
        parts = [(grid.start, *next(tiles)) for grid in picture.grids]
        rows = torch.cat([row[:count] for _, row, _, count in parts])
        found.append(Kept(rows, torch.cat([start + place[:n] for start, _, place, n in parts])))
    return found
