"""What thresholds are predicted from, where untrained ones start, and how their slope changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.maths import average_tokens, standardise_scores, starting_thresholds
from tests.core.test_learning import LAYERS, labelled, learner
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model

KINDS = ["llava-llama", "qwen2_vl"]


def thetas(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(pruning layers, B)."""
    with torch.no_grad():
        model(**inputs)
    layers = atp_patch.last_trace(model).layers
    return torch.stack([layers[layer].thresholds["redundant"] for layer in LAYERS])


def with_last_token_changed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 7) % 50 + 60
    return {**inputs, "input_ids": ids}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("standardise", [True, False])
def test_the_inputs_of_z_are_both_scores_and_the_question(kind: str, standardise: bool) -> None:
    """Eq. 6-8 by hand, with the hidden state of the last prompt token of the plain model."""
    model = learner(kind, standardise=standardise)
    plain = tiny_model(kind)
    inputs = made.batch(model, (made.prompt(made.Words(3), made.Image(6, 6), made.Words(9)),))
    with torch.no_grad():
        states = plain(**inputs, output_hidden_states=True).hidden_states[LAYERS[0]]
        model(**inputs)
    trace = atp_patch.last_trace(model)
    visual = trace.visual[0]
    layer = trace.layers[LAYERS[0]]
    s_self, s_cross = (layer.scores[name][0][visual] for name in ("self", "cross"))
    if standardise:
        s_cross = s_cross.log()
        s_self, s_cross = ((s - s.mean()) / s.std(correction=0) for s in (s_self, s_cross))
    last = states[0, -1] / states[0, -1].square().mean().sqrt()
    heads = model.atp_patch_heads
    z = heads.z["2"](torch.cat([s_self, s_cross, last]))
    for name, head in (("redundant", heads.theta_redundant), ("spatial", heads.theta_spatial)):
        expected = torch.sigmoid(head["2"](z))
        torch.testing.assert_close(layer.thresholds[name], expected, rtol=0, atol=2e-3)


def test_only_thresholds_that_see_the_question_hang_on_its_last_state() -> None:
    """The scores themselves are cut off, so that nothing else tells the last token."""
    moved = {}
    for choice in ("scores", "scores+question"):
        model = learner("llava-llama", threshold_inputs=choice)
        columns = 2 * 6 * 6
        for z in model.atp_patch_heads.z.values():
            with torch.no_grad():
                z.weight[:, :columns] = 0
        inputs = made.batch(model, made.SAME_SIZE)
        difference = thetas(model, inputs) - thetas(model, with_last_token_changed(inputs))
        moved[choice] = float(difference.abs().min())
    assert moved["scores"] == 0
    assert moved["scores+question"] > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_neither_the_answer_nor_what_follows_it_counts(kind: str, padding: str) -> None:
    """An end-of-turn token behind the answer is not supervised, but it has seen the answer."""
    model = learner(kind).train()
    inputs = labelled(model, made.RAGGED, padding)
    answer = inputs["labels"] >= 0
    last = answer & ~answer.roll(-1, 1)  # the last token of every sample
    inputs["labels"] = inputs["labels"].masked_fill(last, -100)
    before = thetas(model, inputs)
    changed = (inputs["input_ids"] + 7) % 50 + 60
    inputs["input_ids"] = torch.where(answer, changed, inputs["input_ids"])
    inputs["labels"] = torch.where(inputs["labels"] >= 0, changed, inputs["labels"])
    assert torch.equal(thetas(model, inputs), before)


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_the_question_that_inference_sees(kind: str) -> None:
    model = learner(kind)
    whole = labelled(model, (made.RAGGED[0],))
    sequences = ("input_ids", "attention_mask", "mm_token_type_ids")
    prompt = {name: x[:, :-2] if name in sequences else x for name, x in whole.items()}
    del prompt["labels"]
    expected = thetas(model, prompt)
    model.train()
    torch.testing.assert_close(thetas(model, whole), expected, rtol=0, atol=1e-5)


def test_standardised_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0, 99.0, 5.0], [2.0, 2.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, False, True], [True, True, False, False]])
    root = (8 / 3) ** 0.5
    expected = torch.tensor([[-2 / root, 0.0, 0.0, 2 / root], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(standardise_scores(scores, valid), expected)


def test_starting_thresholds_leave_the_shares() -> None:
    """Counted on random ranks and places of many tokens."""
    generator = torch.Generator().manual_seed(0)
    count, shares = 20_000, [0.6, 0.3, 0.05]
    place = 1 - 3.0 * (torch.randperm(count, generator=generator) + 1) / count
    alive = torch.ones(count, dtype=torch.bool)
    for (theta_r, theta_s), share in zip(
        starting_thresholds(shares, 0.3, 3.0), shares, strict=True
    ):
        rank = torch.zeros(count)
        n = int(alive.sum())
        rank[alive] = (torch.randperm(n, generator=generator) + 0.5) / n
        alive &= (rank >= theta_r) | (place.clamp(min=0) >= theta_s)
        assert float(alive.float().mean()) == pytest.approx(share, rel=0.03)
    assert starting_thresholds([1.0], 0.0, 3.0) == [(0.0, 1.0)]


@pytest.mark.parametrize("budget", [{"target_tokens": 14}, {"keep": 0.5}, {}])
def test_untrained_heads_start_at_the_budget(budget: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = tiny_model("llava-llama")
    atp_patch.patch_model(model, [1, 3, 5], thresholds="learned", **budget)
    prompts = [
        made.prompt(made.Words(3), made.Image(), made.Words(9), seed=seed) for seed in range(16)
    ]
    with torch.no_grad():
        model(**made.batch(model, prompts))
    trace = atp_patch.last_trace(model)
    goal = 14 if "target_tokens" in budget else 9
    if "keep" in budget:
        goal = average_tokens(36, [18, 9, 4.5], [1, 3, 5], 8)
    assert trace.average_tokens == pytest.approx(goal, rel=0.2)
    values = [theta for layer in trace.layers.values() for theta in layer.thresholds.values()]
    for theta in values:
        assert 0 < float(theta.std()) < 0.05


def gradient(model: Any) -> Tensor:
    model.zero_grad()
    model(**labelled(model, made.SAME_SIZE)).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.atp_patch_heads.parameters()])


@pytest.mark.parametrize("surrogate", ["straight-through", "literal"])
def test_the_slope_is_annealed_by_the_passes_in_training(surrogate: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"surrogate": surrogate, "lambda_atp": 1.0}
    fixed = {
        slope: gradient(learner("llava-llama", slope=slope, **options).train())
        for slope in (10.0, 20.0, 40.0)
    }
    assert not torch.allclose(fixed[10.0], fixed[20.0], rtol=0.05, atol=3e-6)
    assert not torch.allclose(fixed[20.0], fixed[40.0], rtol=0.05, atol=3e-6)
    model = learner("llava-llama", slope=10.0, slope_end=40.0, anneal_passes=2, **options)
    with torch.no_grad():
        model(**made.batch(model, made.SAME_SIZE))  # inference does not count
    model.train()
    torch.testing.assert_close(gradient(model), fixed[10.0], rtol=1e-4, atol=3e-6)
    atp_patch.save_pretrained(model, tmp_path)
    model = atp_patch.patch_model(tiny_model("llava-llama"), weights=tmp_path).train()
    for slope in (20.0, 40.0, 40.0):
        torch.testing.assert_close(gradient(model), fixed[slope], rtol=1e-4, atol=3e-6)


def test_the_papers_temperature_is_no_soft_mask_but_hardly_learns() -> None:
    """T = 1e6: masks are the hard ones, and the gradient is gone almost everywhere."""
    literal = learner("llava-llama", surrogate="literal", slope=1e6).train()
    straight = learner("llava-llama").train()
    with torch.no_grad():
        inputs = made.batch(literal, made.SAME_SIZE)
        torch.testing.assert_close(literal(**inputs).logits, straight(**inputs).logits)
    assert float(gradient(literal).abs().max()) < 1e-6 < float(gradient(straight).abs().max())


@pytest.mark.parametrize("target_loss", ["paper", "smooth", "unbiased"])
def test_a_target_loss_pulls_toward_the_budget(target_loss: str) -> None:
    pulls = {}
    for target in (10.0, 35.0):
        model = learner(
            "llava-llama", target_tokens=target, target_loss=target_loss, lambda_atp=0.0
        ).train()
        model(**labelled(model, made.SAME_SIZE)).loss.backward()
        pulls[target] = float(model.atp_patch_heads.theta_redundant["2"].bias.grad)
    assert pulls[10.0] < 0 < pulls[35.0]  # a descent step raises the threshold to prune more


def test_options_of_annealing_belong_together() -> None:
    for options in ({"slope_end": 40.0}, {"anneal_passes": 3}):
        with pytest.raises(atp_patch.ConfigError, match="belong together"):
            learner("llava-llama", **options)
    with pytest.raises(atp_patch.ConfigError, match=r"scores, scores\+question"):
        learner("llava-llama", threshold_inputs="answer")
