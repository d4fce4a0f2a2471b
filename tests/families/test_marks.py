"""Newline and class tokens: kept, unless ``prune_marks`` says that they may go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.contract import Span, VisualGrid
from atp_patch.families.marks import with_marks
from tests.families.kinds import MIXED, Batch, Kind, make
from tests.families.tables import EVERY
from tests.families.test_every_family import placed
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import real_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, generate, kept_of

BY_NAME = {kind.name: kind for kind in EVERY}
MARKED = [BY_NAME[name] for name in ("llava_next", "llava_onevision", "video_llava")]
with_kind = pytest.mark.parametrize("kind", MARKED, ids=lambda kind: kind.name)


def patched(kind: Kind, **options: Any) -> Any:
    settings = {"method": "fastv", "keep": 0.4, "layers": kind.layers, "prune_marks": True}
    return atp_patch.patch_model(kind.build(), **{**settings, **options})


def drawn(kind: Kind) -> Batch:
    """Pictures with newlines, or videos with a class token a frame."""
    return make(kind, kind.video_samples if kind.name == "video_llava" else MIXED)


@with_kind
@pytest.mark.parametrize("method", ["fastv", "atp", "uniform"])
def test_marks_go_and_gathered_is_masked(kind: Kind, method: str) -> None:
    plain, model, batch = kind.build(), patched(kind, method=method), drawn(kind)
    logits = forward(model, batch.inputs).logits
    kept = kept_of(model)
    survivors = kept[max(kept)]
    placeholders = atp_patch.last_trace(model).visual
    marks = placeholders & ~placed(batch)
    assert marks.any()
    assert (placed(batch) <= placeholders).all()
    if method != "uniform":
        assert (marks & ~survivors).any(), "no mark went: this shows nothing"
    assert survivors[real_mask(batch.inputs) & ~placeholders].all(), "text was pruned"
    assert_close(logits, masked_logits(plain, batch.inputs, kept), survivors)


@with_kind
def test_marks_count_as_visual_tokens(kind: Kind) -> None:
    batch = drawn(kind)
    counted, kept = {}, {}
    for prune_marks in (False, True):
        model = patched(kind, prune_marks=prune_marks)
        forward(model, batch.inputs)
        trace = atp_patch.last_trace(model)
        counted[prune_marks] = torch.tensor(trace.layout.totals)
        kept[prune_marks] = trace.visual
    assert torch.equal(kept[False], placed(batch))
    assert torch.equal(kept[True].sum(1).cpu(), counted[True])
    assert (counted[True] >= counted[False]).all()
    assert (counted[True] > counted[False]).any()


@with_kind
def test_the_cache_changes_no_answer(kind: Kind) -> None:
    model, batch = patched(kind), drawn(kind)
    answers = generate(model, batch.inputs, 3)
    assert torch.equal(generate(model, batch.inputs, 3, use_cache=False), answers)


def test_an_adapter_brings_it_along(tmp_path: Path) -> None:
    kind = BY_NAME["llava_next"]
    model, batch = patched(kind), drawn(kind)
    wanted = forward(model, batch.inputs).logits
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(kind.build(), weights=tmp_path)
    assert torch.equal(forward(again, batch.inputs).logits, wanted)


def test_columns_by_hand() -> None:
    # A 2 x 3 picture with a newline behind each row, a lone class token, three marks in a row.
    grids = [[VisualGrid(5, 1, 2, 3, row_stride=4)], []]
    spans = [[Span(5, 13, 1), Span(20, 21, 2)], [Span(0, 3, 1)]]
    first, second = with_marks(grids, spans)
    assert first[0] == grids[0][0]
    places = [grid.coordinates()[0].tolist() for grid in first[1:]]
    assert places == [[8, 12], [20]]
    assert [grid.coordinates()[0].tolist() for grid in second] == [[0, 1, 2]]
    assert all(grid.width == 1 for grid in (*first[1:], *second))


@pytest.mark.parametrize("changes", [{"rope_2d": "force"}, {"method": "prumerge"}])
def test_what_it_does_not_go_with(changes: dict[str, Any]) -> None:
    options = {"method": "fixed", "keep": 0.5, "prune_marks": True} | changes
    if options["method"] == "fixed":
        options["layers"] = [2]
    with pytest.raises(atp_patch.ConfigError, match="prune_marks goes with methods"):
        atp_patch.patch_model(tiny.tiny_model("llava-llama"), **options)
