"""What every method that there is, and every pair, must hold: one test each, one row each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.methods import METHODS, LayerMethod, PictureMethod, VoCo
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.inputs import Inputs, batch, real_mask, visual_mask
from tests.helpers.run import LAYERS, forward, generate, kept_of
from tests.seam.test_patching import check_restored, used

KINDS = {cls.name: cls for cls in METHODS}
PAIRS = (("prumerge+", "atp"), ("prumerge", "fastv"), ("prumerge+", "sparsevlm"))
# Learned thresholds are a method of their own as far as these properties go.
LEARNED = {"atp, learned": {"thresholds": "learned", "reference_grid": 6}}
CASES = [*atp_patch.available_methods(), *LEARNED, *(" + ".join(pair) for pair in PAIRS)]
BUDGETED = [name for name, cls in KINDS.items() if not issubclass(cls, VoCo)]
# One method of each kind runs on both families. The others take turns: each of them runs on one
# family, and on the other one where slow tests run.
ON_BOTH = {"atp, learned", "fastv", "sparsevlm", "divprune", "prumerge+", "downsample", "voco"}


def rows(cases: Sequence[str], *, others: bool = True) -> list[Any]:
    """Each case on each family; of a case that takes turns the other family is a slow row.

    Args:
        others: whether the cases that take turns run at all where slow tests do not.
    """
    found = []
    for number, case in enumerate(cases):
        for turn, kind in enumerate(tiny.FAMILIES):
            often = case in ON_BOTH or (others and number % len(tiny.FAMILIES) == turn)
            found.append(pytest.param(kind, case, marks=() if often else pytest.mark.slow))
    return found


every = pytest.mark.parametrize(("kind", "case"), rows(CASES))
one_of_each_kind = pytest.mark.parametrize(("kind", "case"), rows(CASES, others=False))


def asked(case: str, **options: Any) -> dict[str, Any]:
    """The arguments of ``patch_model`` for one row."""
    names = [name.split(",")[0] for name in case.split(" + ")]
    inside = issubclass(KINDS[names[-1]], LayerMethod)
    if issubclass(KINDS[names[-1]], VoCo):
        return {"method": case, "num_tokens": 2}
    return {
        "method": names if len(names) > 1 else names[0],
        **({"layers": LAYERS} if inside else {}),
        **LEARNED.get(case, {}),
        # A quarter, the default, is less than these early layers cost.
        **({"keep": 0.5} if inside and KINDS[names[-1]]().needs_budget else {}),
        **options,
    }


def made(kind: str, case: str, **options: Any) -> Any:
    torch.manual_seed(0)  # heads and VoCo tokens begin at random
    return atp_patch.patch_model(tiny.tiny_model(kind), **asked(case, **options))


def left(model: Any, inputs: Inputs) -> list[int]:
    """Visual tokens of each sample in the last layer of the last pass."""
    kept = kept_of(model)
    return (kept[max(kept)] & visual_mask(inputs)).sum(1).tolist()


def test_every_method_has_a_row() -> None:
    assert set(atp_patch.available_methods()) <= set(CASES)
    assert len({cls.name for cls in METHODS}) == len(METHODS)


@every
def test_keeps_what_it_says(kind: str, case: str) -> None:
    model = made(kind, case, keep=0.5)
    inputs = batch(model, prompts.MIXED)
    out = forward(model, inputs, use_cache=True)
    trace, visual, real = atp_patch.last_trace(model), visual_mask(inputs), real_mask(inputs)
    before = real
    for layer in sorted(trace.layers):
        kept = trace.layers[layer].kept
        assert (kept & visual).sum(1).tolist() == list(trace.layers[layer].kept_counts)
        assert kept[real & ~visual].all(), "text went"
        assert not (kept & ~before).any(), "a token came back"
        before = kept
    assert trace.tokens_per_layer[:, -1].tolist() == left(model, inputs)
    # What the trace counts is what the cache holds.
    text = (real & ~visual).sum(1)
    widths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert widths == (trace.tokens_per_layer + text[:, None]).amax(0).tolist()
    totals = visual.sum(1).tolist()
    if case == "voco":
        assert left(model, inputs) == [2, 4, 0, 2]
    elif case in KINDS and not issubclass(KINDS[case], PictureMethod):
        kind_of = KINDS[case]()
        stages = isinstance(kind_of, LayerMethod) and kind_of.stage_before() is not None
        shares = [0.5] * (len(asked(case).get("layers", (0,))) + stages)
        expected = totals
        for share in shares:
            expected = [round(share * count) for count in expected]
        assert left(model, inputs) == expected
    else:
        assert 0 < sum(left(model, inputs)) < sum(totals)


@pytest.mark.parametrize(("kind", "case"), rows([case for case in CASES if case != "voco"]))
def test_never_fewer_than_the_minimum(kind: str, case: str) -> None:
    """VoCo tokens are as many as they are: a minimum is refused."""
    budget = {} if case in LEARNED else {"keep": 0.01}
    model = made(kind, case, min_tokens=5, min_tokens_per_image=3, **budget)
    if case in LEARNED:  # thresholds that nothing reaches
        for head in (model.atp_patch_heads.theta_redundant, model.atp_patch_heads.theta_spatial):
            for layer in head.values():
                torch.nn.init.constant_(layer.bias, 50.0)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    trace, kept = atp_patch.last_trace(model), kept_of(model)
    for number in kept:
        for b, grids in enumerate(trace.grids):
            assert int((kept[number] & trace.visual)[b].sum()) >= min(5, trace.layout.totals[b])
            for grid in grids:
                place = grid.coordinates()[0]
                assert int(kept[number][b, place].sum()) >= 3


@pytest.mark.parametrize(
    ("kind", "door"), rows([name for name, cls in KINDS.items() if cls.where == "door"])
)
def test_every_method_at_the_door_goes_before_one_inside(kind: str, door: str) -> None:
    patch = {"method": [door, "atp"], "layers": (3,), "keep": 0.5}
    model = atp_patch.patch_model(tiny.tiny_model(kind), **patch)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    kept, real = kept_of(model)[3], real_mask(inputs)
    totals = visual_mask(inputs).sum(1).tolist()
    assert list(atp_patch.last_trace(model).layers[0].kept_counts) == [round(n / 2) for n in totals]
    assert left(model, inputs) == [round(round(n / 2) / 2) for n in totals]
    for b, one in enumerate(prompts.MIXED):
        if totals[b]:
            forward(model, batch(model, (one,)))
            assert torch.equal(kept_of(model)[3][0], kept[b, real[b]])


@every
def test_the_same_every_time(kind: str, case: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    first, again = (forward(model, inputs).logits for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, forward(made(kind, case), inputs).logits)


@every
def test_a_batch_is_its_samples(kind: str, case: str) -> None:
    model = made(kind, case)
    padding = "left" if (CASES.index(case) + tiny.FAMILIES.index(kind)) % 2 else "right"
    inputs = batch(model, prompts.MIXED, padding)
    together, kept = forward(model, inputs).logits, kept_of(model)
    survivors, real = kept[max(kept)], real_mask(inputs)
    for b, one in enumerate(prompts.MIXED):
        alone = forward(model, batch(model, (one,))).logits
        where = survivors[b, real[b]][None]
        assert_close(together[b, real[b]][None], alone, where)


@every
def test_the_cache_changes_no_answer(kind: str, case: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    assert torch.equal(generate(model, inputs, 3), generate(model, inputs, 3, use_cache=False))


@pytest.mark.parametrize(("kind", "case"), rows(BUDGETED))
def test_keeping_all_is_plain(kind: str, case: str) -> None:
    inputs = batch(tiny.tiny_model(kind), prompts.MIXED)
    expected = forward(tiny.tiny_model(kind), inputs).logits
    assert torch.equal(forward(made(kind, case, keep=1.0), inputs).logits, expected)


@every
def test_text_alone_is_plain(kind: str, case: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.NO_IMAGE)
    expected = forward(tiny.tiny_model(kind), inputs).logits
    assert torch.equal(forward(model, inputs).logits, expected)


@one_of_each_kind
def test_unpatching_leaves_nothing(kind: str, case: str) -> None:
    """What is left depends on the places where a patch stood, not on what it chose there."""
    model = used(tiny.tiny_model(kind))
    fresh, before = copy.deepcopy(model), snapshot(model)
    atp_patch.patch_model(model, **asked(case))
    assert snapshot(model) != before
    used(model)
    atp_patch.unpatch_model(model)
    check_restored(model, fresh, before)


@every
def test_an_adapter_brings_it_back(kind: str, case: str, tmp_path: Path) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    expected = forward(model, inputs).logits
    atp_patch.save_pretrained(model, tmp_path)
    torch.manual_seed(1)
    other = atp_patch.patch_model(tiny.tiny_model(kind), weights=tmp_path)
    assert torch.equal(forward(other, inputs).logits, expected)
    assert atp_patch.last_trace(other).average_tokens == atp_patch.last_trace(model).average_tokens
