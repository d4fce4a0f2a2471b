"""Which tokens stay: against greedy oracles and full eager attention maps; budgets; the trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice
from tests.helpers.inputs import batch, real_mask, visual_mask
from tests.helpers.oracle import atp_scores, attention_maps, fastv_choice
from tests.helpers.pairing import pairs
from tests.helpers.run import FASTV, LAYERS, METHODS, SHARES, forward, kept_of, patched

BACKENDS = ["sdpa", "eager"]
PADDINGS = ["left", "right"]

# Eq. 4 as printed: probabilities over all keys.
PRINTED = {name: {**METHODS[name], "cross_over": "all"} for name in ("atp", "fixed")}


def budgets(totals: list[int], shares: tuple[float, ...] = SHARES) -> list[list[int]]:
    """Tokens of each sample after each pruning layer; the shares leave whole numbers."""
    counts, left = [], [float(total) for total in totals]
    for share in shares:
        left = [share * tokens for tokens in left]
        assert all(abs(tokens - round(tokens)) < 1e-6 for tokens in left)
        counts.append([round(tokens) for tokens in left])
    return counts


@pairs(kind=tiny.ALL_KINDS, attention=BACKENDS, padding=PADDINGS)
def test_fastv_keeps_what_the_last_token_attends_to(
    kind: str, attention: str, padding: str
) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention)
    inputs = batch(plain, prompts.MIXED, padding)
    forward(model, inputs)
    totals = visual_mask(inputs).sum(1).tolist()
    expected = fastv_choice(plain, inputs, LAYERS, budgets(totals))
    chosen = kept_of(model)
    assert list(chosen) == list(LAYERS)
    for layer in LAYERS:
        earlier = {number: mask for number, mask in chosen.items() if number < layer}
        paid = attention_maps(plain, inputs, earlier).attentions[layer - 1].mean(1)
        last = torch.where(real_mask(inputs), torch.arange(paid.shape[1]), -1).amax(1)
        assert_same_choice(chosen[layer], expected[layer], paid[torch.arange(len(last)), last])


def test_the_fastv_oracle_can_fail() -> None:
    """Attention of another layer, or of another token, chooses otherwise."""
    plain = tiny.tiny_model("llava-llama")
    inputs = batch(plain, prompts.SINGLE)
    right = fastv_choice(plain, inputs, [3], [[12]])[3]
    assert not torch.equal(right, fastv_choice(plain, inputs, [2], [[12]])[2])
    longer = batch(plain, [prompts.prompt(*prompts.SINGLE[0].pieces, prompts.Words(1), seed=1)])
    assert not torch.equal(right, fastv_choice(plain, longer, [3], [[12]])[3][:, :-1])


@pairs(kind=tiny.ALL_KINDS, attention=BACKENDS, padding=PADDINGS, method=["atp", "fixed"])
def test_atp_scores_are_the_attention_maps(
    kind: str, attention: str, padding: str, method: str
) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention, **PRINTED[method])
    check_scores(plain, model, batch(plain, prompts.MIXED, padding))


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_renormalised_scores_are_the_attention_maps(kind: str) -> None:
    """The share of a text row's attention within the visual tokens alone."""
    plain = tiny.tiny_model(kind)
    model = patched(kind, **METHODS["atp"], cross_over="visual")
    check_scores(plain, model, batch(plain, prompts.MIXED), renormalise=True)


@pytest.mark.parametrize("kind", tiny.QWEN)
def test_atp_scores_of_videos(kind: str) -> None:
    plain, model = tiny.tiny_model(kind), patched(kind, **PRINTED["atp"])
    check_scores(plain, model, batch(plain, prompts.VIDEO))


@pytest.mark.parametrize("kind", [tiny.WINDOWED])
def test_atp_scores_in_a_sliding_window(kind: str) -> None:
    plain, model = tiny.tiny_model(kind), patched(kind, **PRINTED["atp"])
    check_scores(plain, model, batch(plain, prompts.MIXED))


def check_scores(plain: Any, model: Any, inputs: prompts.Inputs, renormalise: bool = False) -> None:
    """Eq. 3 and 4 from the full maps of the layer before, among the tokens that reached it."""
    forward(model, inputs)
    trace, chosen = atp_patch.last_trace(model), kept_of(model)
    alive, earlier = real_mask(inputs), {}
    for layer in LAYERS:
        maps = attention_maps(plain, inputs, earlier)
        own, cross = atp_scores(maps, inputs, layer, alive, renormalise)
        scores = trace.layers[layer].scores
        scored = ~own.isnan()
        assert torch.equal(~scores["self"].isnan(), scored), "scored other tokens"
        assert torch.equal(~scores["cross"].isnan(), scored), "scored other tokens"
        assert_close(scores["self"][None], own[None], scored[None])
        assert_close(scores["cross"][None], cross[None], scored[None])
        earlier[layer] = alive = chosen[layer]


def test_the_score_oracle_can_fail() -> None:
    """Scores of another layer, or with one key more pruned, are others."""
    plain = tiny.tiny_model("qwen2_vl")
    inputs = batch(plain, prompts.SINGLE)
    real, visual = real_mask(inputs), visual_mask(inputs)[0]
    maps = attention_maps(plain, inputs, {})
    own, cross = atp_scores(maps, inputs, 3, real)
    other_own, other_cross = atp_scores(maps, inputs, 4, real)
    assert (own - other_own)[0, visual].abs().max() > 1e-2
    assert (cross - other_cross)[0, visual].abs().max() > 1e-3
    pruned = real.clone()
    pruned[0, visual.nonzero()[0]] = False
    fewer = atp_scores(attention_maps(plain, inputs, {2: pruned}), inputs, 3, pruned)
    for before, after in zip((own, cross), fewer, strict=True):
        assert (before - after)[0, visual & ~after[0].isnan()].abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_every_layer_keeps_its_share_exactly(kind: str, method: str) -> None:
    model = patched(kind, **METHODS[method])
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    visual, kept = visual_mask(inputs), kept_of(model)
    expected = budgets(visual.sum(1).tolist())
    for counts, layer in zip(expected, LAYERS, strict=True):
        assert (kept[layer] & visual).sum(1).tolist() == counts


@pytest.mark.parametrize("method", METHODS)
def test_shares_that_leave_fractions_round(method: str) -> None:
    model = patched("llava-llama", **{**METHODS[method], "layers": [3], "keep": 0.35})
    inputs = batch(model, prompts.SINGLE)
    forward(model, inputs)
    assert (kept_of(model)[3] & visual_mask(inputs)).sum().item() in (12, 13)  # of 36: 12.6


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_a_layers_choice_never_comes_back(kind: str) -> None:
    for method, options in METHODS.items():
        model = patched(kind, **options)
        forward(model, batch(model, prompts.MIXED))
        kept = kept_of(model)
        assert not (kept[4] & ~kept[2]).any(), method
        assert not (kept[6] & ~kept[4]).any(), method


@pairs(kind=tiny.FAMILIES, method=METHODS, share=[0.5, 0.7, 0.9, 1.0])
def test_a_target_is_the_average_over_layers(kind: str, method: str, share: float) -> None:
    """Within 2 % or one token, on images of any size."""
    options = {name: value for name, value in METHODS[method].items() if name != "keep"}
    for case in (prompts.SINGLE, prompts.TWO_IMAGES):
        probe = tiny.tiny_model(kind)
        total = visual_mask(batch(probe, case)).sum().item()
        target = share * total
        model = patched(kind, **options, target_tokens=target)
        inputs = batch(model, case)
        forward(model, inputs)
        visual, kept = visual_mask(inputs), kept_of(model)
        after = [(kept[layer] & visual).sum().item() for layer in LAYERS]
        average = (2 * total + 2 * sum(after)) / tiny.LAYERS
        assert abs(average - target) <= max(1.0, 0.02 * target)
        assert atp_patch.last_trace(model).average_tokens == pytest.approx(average)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_a_target_holds_for_every_sample_of_a_batch(kind: str) -> None:
    model = patched(kind, method="atp", layers=LAYERS, target_tokens=20)
    inputs = batch(model, prompts.RAGGED)
    forward(model, inputs)
    for row in atp_patch.last_trace(model).tokens_per_layer.double().mean(1).tolist():
        assert abs(row - 20) <= 1


def test_a_budget_below_the_early_layers_names_the_least() -> None:
    """2 of 8 layers see all 36 tokens, the other 6 at least one: (72 + 6) / 8 = 9.75."""
    with pytest.raises(ValueError, match=r"9\.[78]"):
        patched("llava-llama", method="atp", layers=LAYERS, target_tokens=9)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_the_trace_counts_what_was_kept(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.RAGGED)
    forward(model, inputs)
    trace, kept, visual = atp_patch.last_trace(model), kept_of(model), visual_mask(inputs)
    rows = [visual.sum(1)] * 2
    rows += [(kept[layer] & visual).sum(1) for layer in LAYERS for _ in range(2)]
    expected = torch.stack(rows, 1)
    assert torch.equal(trace.tokens_per_layer, expected)
    assert trace.average_tokens == pytest.approx(expected.double().mean().item())
    text = (real_mask(inputs) & ~visual).sum(1, keepdim=True)
    element = 2 * tiny.KV_HEADS * tiny.HEAD_DIM * 4
    assert trace.kv_bytes == (expected + text).sum().item() * element
    assert trace.kv_bytes_plain == (rows[0][:, None] + text).sum().item() * tiny.LAYERS * element
    assert 0 < trace.flops < trace.flops_plain


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_random_is_seeded_and_uniform_is_blind(kind: str) -> None:
    inputs = batch(tiny.tiny_model(kind), prompts.SAME_SIZE)
    choices = []
    for seed in (0, 0, 1):
        model = patched(kind, **{**METHODS["random"], "seed": seed})
        forward(model, inputs)
        choices.append(kept_of(model)[6])
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])
    assert not torch.equal(choices[0][0], choices[0][1]), "two samples drew alike"
    model = patched(kind, **METHODS["uniform"])
    forward(model, inputs)
    first, second = kept_of(model)[6]
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_budget_keeps_a_token_of_every_sample(method: str) -> None:
    model = patched("qwen2_vl", **{**METHODS[method], "keep": 0.01})
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    left = (kept_of(model)[6] & visual_mask(inputs)).sum(1)
    assert left.tolist() == [1, 1, 0, 1]


def test_fastv_scores_are_in_original_positions() -> None:
    model = patched("qwen2_vl", **{**FASTV, "layers": [3], "keep": 0.5})
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    layer = atp_patch.last_trace(model).layers[3]
    for values in layer.scores.values():
        assert torch.equal(~values.isnan(), visual_mask(inputs))
