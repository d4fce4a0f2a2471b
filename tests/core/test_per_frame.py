"""Budgets frame by frame: every frame, tile and image keeps its own share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.contract import Layout, VisualGrid
from atp_patch.methods import METHODS
from atp_patch.methods.base import Ranking, frame_counts
from tests.helpers import inputs as made
from tests.helpers.run import forward
from tests.helpers.tiny import tiny_model

# VScan has chosen among the tokens before the decoder already.
RANKING = [cls.name for cls in METHODS if issubclass(cls, Ranking) and cls.name != "vscan"]
# 2 videos of other lengths and an image, beside a short sample: shares that do not come out even.
PROMPTS = (
    made.prompt(made.Words(3), made.Video(3, 4, 5), made.Words(8), seed=21),
    made.prompt(made.Image(4, 6), made.Words(2), made.Video(2, 5, 5), made.Words(6), seed=22),
)


def patched(**options: Any) -> Any:
    return atp_patch.patch_model(tiny_model("qwen2_vl"), layers=[2, 4], **options)


def kept_of_frames(model: Any, layer: int) -> list[dict[tuple[int, int], int]]:
    """Of each sample, how many tokens each (image, frame) keeps after a pruning layer."""
    trace = atp_patch.last_trace(model)
    kept, layout = trace.layers[layer].kept, trace.layout
    found = []
    for b, total in enumerate(layout.totals):
        counts: dict[tuple[int, int], int] = {}
        for v in range(total):
            place = int(layout.image[b, v]), int(layout.frame[b, v])
            counts[place] = counts.get(place, 0) + int(kept[b, layout.position[b, v]])
        found.append(counts)
    return found


@pytest.mark.parametrize("method", RANKING)
def test_every_frame_keeps_its_share(method: str) -> None:
    options = {"recycle_share": 0.0} if method == "sparsevlm" else {}
    model = patched(method=method, keep=0.5, per_frame=True, **options)
    forward(model, made.batch(model, PROMPTS))
    video, both = kept_of_frames(model, 2)
    assert set(video.values()) == {10}
    assert both[0, 0] == 12
    assert sorted([both[1, 0], both[1, 1]]) == [12, 13]
    video, both = kept_of_frames(model, 4)
    assert set(video.values()) == {5}
    assert both[0, 0] == 6
    assert both[1, 0] + both[1, 1] in (12, 13)


def test_frames_compete_without_it() -> None:
    model = patched(method="fastv", keep=0.5)
    forward(model, made.batch(model, PROMPTS))
    shares = kept_of_frames(model, 2)[0]
    assert sum(shares.values()) == 30
    assert set(shares.values()) != {10}


def test_each_frame_keeps_its_best() -> None:
    model = patched(method="fastv", keep=0.5, per_frame=True)
    forward(model, made.batch(model, PROMPTS[:1]))
    trace = atp_patch.last_trace(model)
    scores, layout = trace.layers[2].scores["last"][0], trace.layout
    kept = trace.layers[2].kept[0, layout.position[0]]
    for frame in range(3):
        own = (layout.frame[0] == frame).nonzero().flatten()
        ranks = scores[layout.position[0, own]].argsort(descending=True)
        best = own[ranks[:10]]
        assert set(own[kept[own]].tolist()) == set(best.tolist())


def _view(grids: list[list[VisualGrid]], alive: Tensor, least: int) -> Any:
    layout = Layout.from_grids(grids, 400, torch.device("cpu"))
    token = torch.arange(layout.valid.shape[1]).expand(layout.valid.shape)
    return SimpleNamespace(
        layout=layout,
        slot=token,
        slot_valid=layout.valid & alive[:, : token.shape[1]],
        min_tokens_per_image=least,
        image=layout.image.gather(1, token),
        of_token=lambda table: table.gather(1, token),
    )


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_whole_fair_and_sum_to_the_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grids = [
        [VisualGrid(0, 5, 4, 4), VisualGrid(100, 1, 3, 7)],
        [],
        [VisualGrid(10, 1, 2, 2), VisualGrid(40, 3, 5, 5), VisualGrid(130, 2, 1, 9)],
    ]
    alive = torch.rand(3, 400, generator=generator) < 0.6
    view = _view(grids, alive, least=2)
    left = view.slot_valid.sum(1)
    counts = (left * 0.4).long().clamp(min=0)
    frame, shares = frame_counts(view, counts)
    assert shares.sum(1).tolist() == counts.tolist()
    sizes = torch.stack(
        [((frame == f) & view.slot_valid).sum(1) for f in range(shares.shape[1])], 1
    )
    assert (shares <= sizes).all()
    assert (shares >= 0).all()
    fair = sizes * (counts / left.clamp(min=1))[:, None]
    assert ((shares - fair).abs() < 2.01).all()
    for b, sample in enumerate(grids):
        at = 0
        for grid in sample:
            own = slice(at, at + grid.frames)
            assert shares[b, own].sum() >= min(2, int(sizes[b, own].sum()))
            at += grid.frames


def test_methods_that_do_not_rank_refuse_it() -> None:
    assert "fastv" in RANKING
    assert "atp" not in RANKING
    with pytest.raises(atp_patch.ConfigError, match="per_frame"):
        patched(method="atp", keep=0.5, per_frame=True)
