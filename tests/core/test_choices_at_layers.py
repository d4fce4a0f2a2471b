"""PyramidDrop and DART against plain statements of them: loops over the tokens of one sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.methods import make_method
from tests.helpers import inputs as made
from tests.helpers.inputs import batch
from tests.helpers.run import forward
from tests.helpers.tiny import tiny_model
from tests.helpers.views import layer_view

SOURCES = ("llava-llama", "qwen2_vl", "llava", "dynamic")
FEATURES = ("as they are", "random", "all equal", "one spike", "few distinct")
CASES = [
    *(("llava-llama", features) for features in FEATURES),
    *((source, "as they are") for source in SOURCES[1:]),
]


def changed(features: str, like: Tensor) -> Tensor:
    """Other vectors in place of (n, D) ones."""
    draw = torch.Generator().manual_seed(3)
    n, size = like.shape
    if features == "as they are":
        return like
    if features == "random":
        return torch.randn(n, size, generator=draw)
    if features == "all equal":
        return torch.ones(n, size)
    if features == "one spike":
        made = torch.full((n, size), 0.01)
        made[n // 2] = 100.0 * torch.arange(size)
        return made
    assert features == "few distinct"
    return torch.randn(3, size, generator=draw)[torch.arange(n) % 3]


def with_features(view: atp_patch.View, features: str) -> atp_patch.View:
    """The view with other hidden states at its visual tokens, and keys that follow them."""
    hidden = view.hidden.clone().float()
    _, keys = view.unrotated()
    keys = keys.clone().float()
    for b in range(len(hidden)):
        places = view.slot[b, view.slot_valid[b]]
        if len(places):
            hidden[b, places] = changed(features, hidden[b, places])
            heads, size = keys.shape[1], keys.shape[3]
            flat = keys[b][:, places].transpose(0, 1).flatten(1)
            keys[b, :, places] = changed(features, flat).unflatten(1, (heads, size)).transpose(0, 1)
    previous = replace(view.previous_attention, unrotated=lambda: (view.query, keys))
    return replace(view, hidden=hidden, attention={view.layer - 1: previous})


def cosine(one: Tensor, other: Tensor) -> float:
    """In double precision; 0 where a vector is 0."""
    one, other = one.double(), other.double()
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size else 0.0


def dart(view: atp_patch.View, b: int, count: int, visual: int, text: int) -> set[int]:
    """The columns of the view that DART keeps of one sample."""
    _, keys = view.unrotated()
    columns = [v for v in range(view.slot.shape[1]) if view.slot_valid[b, v]]
    rows = [t for t in range(view.text.shape[1]) if view.text_valid[b, t]]

    def norm(place: Tensor) -> float:
        return float(keys[b, :, place].float().abs().sum())

    # A stable sort: of equal norms the earlier token comes first.
    by_norm = sorted(columns, key=lambda v: -norm(view.slot[b, v]))
    pivots = [view.hidden[b, view.slot[b, v]] for v in by_norm[: min(visual, count)]]
    kept = set(by_norm[: min(visual, count)])
    words = sorted(rows, key=lambda t: -norm(view.text[b, t]))[:text]
    pivots += [view.hidden[b, view.text[b, t]] for t in words]
    each, more = divmod(count - len(kept), max(len(pivots), 1))
    for number, pivot in enumerate(pivots):
        alike = {v: cosine(pivot, view.hidden[b, view.slot[b, v]]) for v in columns}
        left = [v for v in columns if v not in kept]
        left.sort(key=lambda v: round(alike[v], 5))
        kept |= set(left[: each + (number < more)])
    return kept


def columns_of(keep: Tensor, valid: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in keep & valid]


@pytest.mark.parametrize(("source", "features"), CASES)
def test_dart_is_its_plain_statement(source: str, features: str) -> None:
    view = with_features(layer_view(source, keep=0.5), features)
    method: Any = make_method("dart", {})
    kept = columns_of(method.decide(view, None).keep, view.slot_valid)
    assert view.counts is not None
    for b, count in enumerate(view.counts):
        assert kept[b] == dart(view, b, count, 4, 4), f"sample {b}"


@pytest.mark.parametrize(("visual", "text", "keep"), [(1, 0, 0.3), (20, 2, 0.2), (3, 50, 0.9)])
def test_dart_with_other_numbers_of_pivots(visual: int, text: int, keep: float) -> None:
    view = with_features(layer_view("llava-llama", keep=keep), "random")
    method: Any = make_method("dart", {"visual_pivots": visual, "text_pivots": text})
    kept = columns_of(method.decide(view, None).keep, view.slot_valid)
    assert view.counts is not None
    for b, count in enumerate(view.counts):
        assert kept[b] == dart(view, b, count, visual, text), f"sample {b}"


def test_dart_needs_a_pivot() -> None:
    for wrong in ({"visual_pivots": 0}, {"text_pivots": -1}):
        with pytest.raises(atp_patch.ConfigError, match="must be at least 1"):
            make_method("dart", wrong)


@pytest.mark.parametrize("source", SOURCES)
def test_pyramiddrop_ranks_by_the_last_rows_attention(source: str) -> None:
    view = layer_view(source, keep=0.5)
    method: Any = make_method("pyramiddrop", {})
    decision = method.decide(view, None)
    kept = columns_of(decision.keep, view.slot_valid)
    groups = view.query.shape[1] // view.key.shape[1]
    for b in range(len(kept)):
        columns = view.slot_valid[b].nonzero().flatten().tolist()
        paid = dict.fromkeys(columns, 0.0)
        seen = view.mask_rows(view.last[:, None])[b, :, 0]
        seen = seen if seen.dtype == torch.bool else seen > -1e9
        for head in range(view.query.shape[1]):
            logits = {}
            for place in range(view.key.shape[2]):
                if seen[min(head, len(seen) - 1), place]:
                    key = view.key[b, head // groups, place].double()
                    query = view.query[b, head, view.last[b]].double()
                    logits[place] = torch.exp(query @ key * view.scaling)
            total = sum(logits.values())
            for v in columns:
                paid[v] += float(logits[int(view.slot[b, v])] / total) / view.query.shape[1]
        assert view.counts is not None
        best = sorted(columns, key=lambda v: -paid[v])[: view.counts[b]]
        assert kept[b] == set(best)


@pytest.mark.parametrize(("layers", "kept"), [(None, {2: 18, 4: 9, 6: 4}), ([3], {3: 18})])
def test_pyramiddrop_halves_by_itself(layers: list[int] | None, kept: dict[int, int]) -> None:
    model = atp_patch.patch_model(tiny_model("llava-llama"), layers, "pyramiddrop")
    forward(model, batch(model, made.SINGLE))
    trace = atp_patch.last_trace(model)
    assert {n: layer.kept_counts[0] for n, layer in trace.layers.items()} == kept
