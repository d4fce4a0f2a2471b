"""Door methods: what enters the decoder is chosen among projected features, before layer 0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.doors import Asked, TowerReader, told
from tests.helpers.inputs import batch, real_mask, visual_mask
from tests.helpers.pairing import pairs
from tests.helpers.run import Session, forward, generate, kept_of, positioned, words
from tests.seam.test_patching import check_restored, used

METHODS = {
    "merges": Asked(),
    "chooses": Asked(merges=False),
    "reads the tower": TowerReader(),
}
PAIRS: dict[str, dict[str, Any]] = {
    "merges, then fastv": {"method": [Asked(share=0.5), "fastv"], "layers": [2, 5]},
    "tower, then atp": {"method": [TowerReader(share=0.6), "atp"], "layers": [3]},
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"method": method} for name, method in METHODS.items()},
    **PAIRS,
}
families = pytest.mark.parametrize("kind", tiny.FAMILIES)
NARROWING = [case for case in CASES if case != "chooses"]
every = pytest.mark.parametrize("case", NARROWING)
paddings = pytest.mark.parametrize("padding", ["left", "right"])


def made(kind: str, case: str, attention: str = "sdpa", **options: Any) -> Any:
    asked = {**CASES[case], "keep": 0.5, **options}
    return atp_patch.patch_model(tiny.tiny_model(kind, attention), **asked)


def merges(case: str) -> bool:
    return case.startswith("merges")


@pairs(kind=tiny.FAMILIES, case=CASES, padding=["left", "right"])
def test_gathered_is_masked(kind: str, case: str, padding: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED, padding)
    logits = forward(model, inputs).logits
    trace, visual = atp_patch.last_trace(model), visual_mask(inputs)
    entering = trace.layers[0].kept
    assert entering[real_mask(inputs) & ~visual].all()
    share = {"merges, then fastv": 0.5, "tower, then atp": 0.6}.get(case, 0.5)
    totals = visual.sum(1).tolist()
    assert (entering & visual).sum(1).tolist() == [round(share * total) for total in totals]
    assert list(trace.layers[0].kept_counts) == [round(share * total) for total in totals]
    expected = told(tiny.tiny_model(kind), inputs, trace, merges=merges(case))
    assert_close(logits, expected, kept_of(model)[max(trace.layers)])


@every
@families
def test_what_the_trace_counts_is_what_the_cache_holds(kind: str, case: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    cache = forward(model, inputs, use_cache=True).past_key_values
    trace = atp_patch.last_trace(model)
    text = (real_mask(inputs) & ~visual_mask(inputs)).sum(1)
    widths = [layer.keys.shape[2] for layer in cache.layers]
    assert widths == (trace.tokens_per_layer + text[:, None]).amax(0).tolist()
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pairs(kind=tiny.FAMILIES, case=NARROWING, attention=["sdpa", "eager"])
def test_keeping_all_is_plain(kind: str, case: str, attention: str) -> None:
    plain = tiny.tiny_model(kind, attention)
    inputs = batch(plain, prompts.MIXED)
    keep_all = {"keep": 1.0}
    if case in PAIRS:
        first, second = PAIRS[case]["method"]
        keep_all["method"] = [type(first)(share=1.0), second]  # type: ignore[assignment]
    model = made(kind, case, attention, **keep_all)
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    assert torch.equal(generate(model, inputs), generate(plain, inputs))


@every
@families
def test_a_batch_is_its_samples(kind: str, case: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED, "right")
    together, kept = forward(model, inputs).logits, kept_of(model)
    survivors, real = kept[max(kept)], real_mask(inputs)
    for b, one in enumerate(prompts.MIXED):
        alone = forward(model, batch(model, (one,))).logits
        assert_close(together[b, real[b]][None], alone, survivors[b, real[b]][None])


@every
@families
def test_the_cache_changes_no_answer(kind: str, case: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    cached = generate(model, inputs)
    assert torch.equal(cached, generate(model, inputs, use_cache=False))
    for b, one in enumerate(prompts.MIXED):
        assert torch.equal(generate(model, batch(model, (one,)))[0, -4:], cached[b, -4:])


@pairs(
    kind=tiny.FAMILIES,
    case=NARROWING,
    how=[{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
)
def test_beams_and_samples_of_a_batch(kind: str, case: str, how: dict[str, Any]) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    answers = generate(model, inputs, 4, **how)
    assert torch.equal(generate(model, inputs, 4, use_cache=False, **how), answers)
    if "num_beams" in how:
        for b, one in enumerate(prompts.MIXED):
            alone = generate(model, batch(model, (one,)), 4, **how)
            assert torch.equal(alone[0, -4:], answers[b, -4:])


@every
@families
def test_a_conversation_goes_on(kind: str, case: str) -> None:
    """Later turns on the same cache see what entered, at its own positions."""
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    talk = Session(model, inputs)
    trace = atp_patch.last_trace(model)
    for turn in range(2):
        logits = talk.feed(words(len(prompts.MIXED), 3, turn))
        given = positioned(model, talk.inputs)
        expected = told(tiny.tiny_model(kind), given, trace, merges=merges(case))
        assert_close(logits, expected[:, -3:])


@every
@families
def test_unpatching_leaves_nothing(kind: str, case: str) -> None:
    model = used(tiny.tiny_model(kind))
    fresh, before = copy.deepcopy(model), snapshot(model)
    atp_patch.patch_model(model, **{**CASES[case], "keep": 0.5})
    assert snapshot(model) != before
    used(model)
    atp_patch.unpatch_model(model)
    check_restored(model, fresh, before)


@every
@families
def test_text_alone_is_plain(kind: str, case: str) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.NO_IMAGE)
    expected = forward(tiny.tiny_model(kind), inputs).logits
    assert torch.equal(forward(model, inputs).logits, expected)


@every
@families
def test_never_fewer_than_the_minimum(kind: str, case: str) -> None:
    model = made(kind, case, keep=0.01, min_tokens=5, min_tokens_per_image=3)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    trace, kept = atp_patch.last_trace(model), kept_of(model)
    for number in kept:
        for b, grids in enumerate(trace.grids):
            assert int((kept[number] & trace.visual)[b].sum()) >= min(5, trace.layout.totals[b])
            for grid in grids:
                assert int(kept[number][b, grid.coordinates()[0]].sum()) >= 3


@families
@pytest.mark.parametrize("case", list(METHODS))
def test_a_number_of_tokens_is_kept(kind: str, case: str) -> None:
    model = made(kind, case, keep=None, target_tokens=10)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    trace = atp_patch.last_trace(model)
    assert trace.layers[0].kept_counts == tuple(min(10, n) for n in trace.layout.totals)
    assert trace.average_tokens == pytest.approx(10)


@families
def test_without_a_budget_a_share_or_a_quarter_is_kept(kind: str) -> None:
    for method, share in ((Asked(), 0.25), (Asked(share=0.75), 0.75)):
        model = made(kind, "merges", method=method, keep=None)
        inputs = batch(model, prompts.MIXED)
        forward(model, inputs)
        expected = tuple(round(share * int(n)) for n in visual_mask(inputs).sum(1))
        assert atp_patch.last_trace(model).layers[0].kept_counts == expected


@families
@pytest.mark.parametrize(
    ("budget", "entering", "left"),
    [
        ({"keep": 0.5}, 0.5, 0.5),
        # Two of eight layers run on what entered, and the others on a third of that.
        ({"target_tokens": 12}, 12 / (2 / 8 + 6 / 8 / 3), 1 / 3),
        ({}, 0.25 / (2 / 8 + 6 / 8 / 3), 1 / 3),
    ],
)
def test_in_a_pair_without_a_share_the_budget_says_how_many_enter(
    kind: str, budget: dict[str, Any], entering: float, left: float
) -> None:
    pair = {"method": [Asked(), "fastv"], "layers": [2], "keep": None, **budget}
    model = made(kind, "merges", **pair)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    trace = atp_patch.last_trace(model)
    for b, total in enumerate(trace.layout.totals):
        wanted = entering if "target_tokens" in budget else entering * total
        entered = min(round(wanted), total)
        assert trace.layers[0].kept_counts[b] == entered
        if "target_tokens" not in budget or total > wanted:
            assert abs(trace.layers[2].kept_counts[b] - left * entered) <= 1
    if "target_tokens" in budget:
        averages = trace.tokens_per_layer.double().mean(1)
        wanted_average = torch.tensor([min(12, n) for n in trace.layout.totals])
        assert bool(((averages - wanted_average).abs() <= 0.5).all())


@families
def test_a_method_that_decides_by_itself_gets_no_counts(kind: str) -> None:
    class Free(Asked):
        name = "free"

        @property
        def needs_budget(self) -> bool:
            return False

        def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
            assert view.counts is None
            return atp_patch.Decision(view.slot_valid & (view.token % 3 == 0))

    model = made(kind, "merges", method=Free(), keep=None)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    expected = tuple(-(-int(n) // 3) for n in visual_mask(inputs).sum(1))
    assert atp_patch.last_trace(model).layers[0].kept_counts == expected


@families
@paddings
def test_what_a_door_method_sees(kind: str, padding: str) -> None:
    views: list[atp_patch.DoorView] = []

    class Looks(Asked):
        name = "looks"

        def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
            views.append(view)
            return super().decide(view)

    model = made(kind, "merges", method=Looks())
    inputs = batch(model, prompts.MIXED, padding)
    embeds: list[Tensor] = []
    plain = tiny.tiny_model(kind)
    plain.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    forward(plain, inputs)
    forward(model, inputs)
    (view,), visual, real = views, visual_mask(inputs), real_mask(inputs)
    for b in range(len(visual)):
        assert torch.equal(view.features[b, view.slot_valid[b]], embeds[0][b, visual[b]])
        assert not view.features[b, ~view.slot_valid[b]].any()
        text = real[b] & ~visual[b]
        assert torch.equal(view.text[b, view.text_valid[b]], embeds[0][b, text])
        assert (
            view.text_position[b, view.text_valid[b]].tolist() == text.nonzero().flatten().tolist()
        )
    assert dict(view.tower) == {}


def test_what_is_to_be_answered_is_not_seen() -> None:
    seen: list[int] = []

    class Looks(Asked):
        name = "looks"

        def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
            seen.append(int(view.text_valid.sum()))
            return super().decide(view)

    model = made("llava-llama", "merges", method=Looks())
    inputs = batch(model, prompts.SINGLE)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    forward(model, inputs)
    forward(model, {**inputs, "labels": labels})
    assert seen[1] == seen[0] - 2


@every
@families
def test_an_adapter_brings_it_back(kind: str, case: str, tmp_path: Path) -> None:
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED)
    expected = forward(model, inputs).logits
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(tiny.tiny_model(kind), weights=tmp_path)
    assert torch.equal(forward(again, inputs).logits, expected)


@pytest.mark.parametrize(
    ("share", "said"), [(None, "a quarter of the visual tokens"), (0.4, "a share of 0.4 of the")]
)
def test_the_card_says_how_many_enter(share: float | None, said: str, tmp_path: Path) -> None:
    model = made("llava-llama", "merges", method=Asked(share=share), keep=None)
    atp_patch.save_pretrained(model, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"It prunes before the decoder; budget: {said}" in card


@families
@pytest.mark.parametrize("case", ["merges", "tower, then atp"])
def test_training_learns_through_what_entered(kind: str, case: str) -> None:
    """The loss is that of the pruned pass, and the projector gets a gradient through merges."""
    model = made(kind, case)
    inputs = batch(model, prompts.MIXED, "right")
    labels = inputs["input_ids"].masked_fill(~real_mask(inputs) | visual_mask(inputs), -100)
    labels[:, :-3] = -100
    expected = forward(model, {**inputs, "labels": labels}).loss
    model.train()
    loss = model(**inputs, labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    projector = [
        p for n, p in model.named_parameters() if "multi_modal_projector" in n or "merger" in n
    ]
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in projector)


@families
def test_learned_thresholds_behind_merges_weigh_what_is_gathered_at_inference(kind: str) -> None:
    options = {"layers": [3], "thresholds": "learned", "reference_grid": 6}
    torch.manual_seed(0)
    model = made(kind, "merges", method=[Asked(share=0.5), "atp"], **options)
    inputs = batch(model, prompts.MIXED)
    expected = forward(model, inputs).logits
    trace = atp_patch.last_trace(model)
    model.train()
    got = forward(model, inputs).logits
    assert torch.equal(atp_patch.last_trace(model).layers[3].kept, trace.layers[3].kept)
    assert_close(got, expected, trace.layers[3].kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "before the decoder: leave layers out"),
        ({"method": ["fastv", Asked(share=0.5)]}, "then one that prunes inside it"),
        ({"keep": 0.5, "target_tokens": 3}, "give one of them"),
        ({"prune_marks": True}, "prune_marks goes with methods"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(atp_patch.ConfigError, match=message):
        atp_patch.patch_model(tiny.tiny_model("llava-llama"), **{"method": Asked(), **options})
    with pytest.raises(atp_patch.ConfigError, match="share=2 must be above 0"):
        Asked(share=2)


def test_a_wrong_decision_names_the_method() -> None:
    class Wrong(Asked):
        name = "wrong"

        def decide(self, view: atp_patch.DoorView) -> Any:
            return atp_patch.Decision(view.slot_valid & False)

    model = made("qwen2_vl", "merges", method=Wrong())
    with pytest.raises(atp_patch.ATPError, match=r"^wrong: a sample keeps fewer than min_tokens=1"):
        forward(model, batch(model, prompts.MIXED))
