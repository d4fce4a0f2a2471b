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
    VisualGrid,
)
from atp_patch.contract.decision import check_decision
from atp_patch.contract.errors import InputError
from atp_patch.integrations.vllm.settings import Settings
from atp_patch.maths import gather_tokens, pack
from atp_patch.seam import VisualTokens
from atp_patch.seam.decoder.visual_tokens import Choice


class Kept(NamedTuple):
    """What is left of one picture.

    Attributes:
        features: (m, D), the features that enter the decoder, in the order of the picture.
        place: (m,) int64, their places in the picture in reading order.
    """

    features: Tensor
    place: Tensor


def keep_features(
    settings: Settings,
    features: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    tower: Mapping[float, TowerTokens] | None = None,
    *,
    width: int | None = None,
) -> list[Kept]:
    """Let a door method choose among the features of pictures, and merge what it merges.

    Args:
        settings: the door method and the budget.
        features: for each picture, (n, D) projected features in reading order.
        sizes: for each picture, the rows and columns of its features.
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
    totals = tuple(height * width for height, width in sizes)
    counts = tuple(map(settings.count, totals))
    if counts == totals:
        return [Kept(one, torch.arange(len(one), device=one.device)) for one in features]
    view = view_of([one[:, :width] for one in features], sizes, counts, tower)
    if not bool(view.features.isfinite().all()):
        raise InputError(
            "a picture's features are NaN or infinite, and nothing can be chosen by them; a model "
            "in float16 may overflow: serve it with --dtype bfloat16 or float32."
        )
    decision = check_decision(method.decide(view), view, method.name)
    keep = decision.keep & view.slot_valid
    visual = VisualTokens.all_of(view.layout)
    every = pad_sequence(list(features), batch_first=True)
    table = Choice(decision, visual, view.token, counts, None).merged(every)
    index, valid = pack(keep)
    chosen = gather_tokens(table, index)
    return [
        Kept(row[used], place[used]) for row, place, used in zip(chosen, index, valid, strict=True)
    ]


def view_of(
    features: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    counts: tuple[int, ...],
    tower: Mapping[float, TowerTokens] | None = None,
) -> DoorView:
    """What a door method sees of pictures alone.

    Args:
        features: for each picture, (n, D) projected features in reading order.
        sizes: for each picture, the rows and columns of its features.
        counts: for each picture, how many of them stay.
        tower: what the vision tower did.
    """
    grids = [[VisualGrid(0, 1, height, width)] for height, width in sizes]
    table = pad_sequence(list(features), batch_first=True)
    layout = Layout.from_grids(grids, table.shape[1], table.device)
    tokens = VisualTokens.all_of(layout)
    none = tokens.token[:, :0]
    return DoorView(
        layout=layout,
        token=tokens.token,
        slot_valid=tokens.valid,
        counts=counts,
        sample_key=torch.zeros(len(grids), dtype=torch.long, device=table.device),
        features=table,
        text=table[:, :0],
        text_valid=none.bool(),
        text_position=none,
        tower=tower or {},
    )


def merge_features(settings: Settings, groups: TokenGroups, features: Tensor) -> list[Kept]:
    """Let a tower method choose among the tower's tokens, and merge what it merges.

    Args:
        settings: the tower method and the budget.
        groups: the tokens of each picture, in reading order.
        features: (G, n, Dt) the projector's inputs of the same tokens.
    """
    method = settings.method
    assert isinstance(method, TowerMethod), "methods at the door choose after the projector"
    merge = method.merge(groups)
    made = (merge.weight @ features.float()).to(features.dtype)
    table = torch.where(merge.changed[..., None], made, gather_tokens(features, merge.index))
    used = merge.keep.sum(1).tolist()
    return [
        Kept(row[:count], place[:count])
        for row, place, count in zip(table, merge.index, used, strict=True)
    ]
