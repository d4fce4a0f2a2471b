"""Training: masked attention is gathered attention, and the thresholds learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import atp_patch
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model

LAYERS = [2, 4, 6]
KINDS = ["llava-llama", "qwen2_vl"]


def learner(kind: str, attention: str = "sdpa", **options: Any) -> Any:
    model = tiny_model(kind, attention)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"thresholds": "learned", "reference_grid": 6, **options}
    atp_patch.patch_model(model, LAYERS, **settings)
    for name, parameter in model.atp_patch_heads.named_parameters():
        torch.nn.init.normal_(parameter, 0, 0.3 if "theta" in name else 0.05)
    return model


def labelled(model: Any, prompts: Any = made.MIXED, padding: str = "right") -> dict[str, Tensor]:
    """The last two tokens of every sample are the answer."""
    inputs = made.batch(model, prompts, padding)
    mask = inputs["attention_mask"]
    from_end = mask.flip(1).cumsum(1).flip(1) * mask
    answer = (from_end > 0) & (from_end <= 2)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~answer, -100)}


@pytest.mark.parametrize("kind", [*KINDS, "llava-mistral", "qwen2_5_vl"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_masked_training_is_gathered_inference(kind: str, attention: str, padding: str) -> None:
    model = learner(kind, attention)
    inputs = made.batch(model, made.MIXED, padding)
    with torch.no_grad():
        expected = model(**inputs).logits
        gathered = atp_patch.last_trace(model)
        model.train()
        got = model(**inputs).logits
    masked = atp_patch.last_trace(model)
    assert gathered.average_tokens < gathered.visual_tokens
    for layer in LAYERS:
        assert torch.equal(masked.layers[layer].kept, gathered.layers[layer].kept)
        for name, theta in gathered.layers[layer].thresholds.items():
            torch.testing.assert_close(masked.layers[layer].thresholds[name], theta)
    kept = gathered.layers[6].kept
    torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_does_not_change_the_choice(kind: str) -> None:
    model = learner(kind).train()
    inputs = labelled(model)
    with torch.no_grad():
        model(**inputs)
        first = atp_patch.last_trace(model)
        answer = inputs["labels"] >= 0
        changed = (inputs["input_ids"] + 7) % 50 + 60
        inputs["input_ids"] = torch.where(answer, changed, inputs["input_ids"])
        inputs["labels"] = torch.where(answer, changed, inputs["labels"])
        model(**inputs)
    second = atp_patch.last_trace(model)
    for layer in LAYERS:
        assert torch.equal(first.layers[layer].kept, second.layers[layer].kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kind_of_target", ["paper", "smooth"])
def test_the_loss_is_the_sum_of_equation_14(kind: str, kind_of_target: str) -> None:
    model = learner(
        kind,
        target_tokens=12,
        lambda_atp=0.3,
        lambda_target=0.7,
        target_loss=kind_of_target,
    ).train()
    inputs = labelled(model)
    outputs = model(**inputs)
    trace = atp_patch.last_trace(model)
    vocabulary = outputs.logits.shape[-1]
    ntp = cross_entropy(
        outputs.logits[:, :-1].reshape(-1, vocabulary), inputs["labels"][:, 1:].flatten()
    )
    seen = [b for b, total in enumerate(trace.layout.totals) if total]
    l_atp = sum(
        layer * trace.layers[layer].kept_counts[b] / trace.layout.totals[b]
        for b in seen
        for layer in LAYERS
    ) / len(seen)
    difference = trace.average_tokens - 12
    l_target = abs(difference)
    if kind_of_target == "smooth":
        l_target = 500 * (difference / trace.visual_tokens) ** 2
    assert trace.losses == pytest.approx({"atp": l_atp, "target": l_target}, rel=1e-4)
    total = float(outputs.loss.detach())
    assert total == pytest.approx(float(ntp.detach()) + 0.3 * l_atp + 0.7 * l_target, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_learns_from_the_next_token_alone(kind: str) -> None:
    model = learner(kind, lambda_atp=0, lambda_target=0).train()
    model(**labelled(model)).loss.backward()
    for name, parameter in model.atp_patch_heads.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_scores_stay_out_of_the_decoders_gradient_unless_asked() -> None:
    reached = {}
    for detached in (True, False):
        model = learner("llava-llama", detach_scores=detached, score_norm="minmax").train()
        inputs = labelled(model)
        del inputs["labels"]
        model(**inputs)
        decision = atp_patch.last_trace(model).layers[2].decision
        assert decision is not None
        assert decision.soft is not None
        weights = model.model.language_model.layers[1].self_attn.k_proj.weight
        gradient = torch.autograd.grad(decision.soft.sum(), weights, allow_unused=True)[0]
        reached[detached] = gradient is not None and bool(gradient.abs().sum() > 0)
    assert reached == {True: False, False: True}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = {}
    for checkpointing in (False, True):
        model = learner(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**labelled(model), use_cache=False).loss.backward()
        gradients[checkpointing] = {
            name: parameter.grad for name, parameter in model.named_parameters()
        }
    for name, gradient in gradients[False].items():
        other = gradients[True][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [{"use_reentrant": True}, {}, "peft"], ids=str)
def test_reentrant_checkpointing_is_refused_by_name(given: Any) -> None:
    """Torch's default, where the key is left out, is reentrant."""
    model = learner("llava-llama").train()
    if given == "peft":
        model.is_loaded_in_8bit = True  # as transformers marks a quantised model
        pytest.importorskip("peft").prepare_model_for_kbit_training(model)
        model.atp_patch_heads.requires_grad_(True)
    else:
        model.gradient_checkpointing_enable(given)
    with pytest.raises(atp_patch.UnsupportedModelError, match="'use_reentrant': False"):
        model(**labelled(model), use_cache=False)


def test_a_filled_cache_is_refused_in_training() -> None:
    model = learner("llava-llama")
    inputs = made.batch(model, made.SINGLE)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model.train()
        with pytest.raises(atp_patch.CacheError, match="no filled cache"):
            model(**inputs, past_key_values=cache)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """Told how many supervised tokens there are in all, halves add up as the host's own loss
    does.
    """
    model = learner("llava-llama", lambda_atp=0.5, lambda_target=0.0).train()
    inputs = labelled(model, made.SAME_SIZE)
    items = (inputs["labels"][:, 1:] != -100).sum()
    whole = model(**inputs, num_items_in_batch=items).loss
    halves = []
    for b in range(2):
        half = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
        halves.append(model(**half, num_items_in_batch=items).loss)
    assert float(sum(halves)) == pytest.approx(float(whole), rel=1e-4)


def test_a_bare_loop_meets_its_budget() -> None:
    model = learner("llava-llama", target_tokens=14, lambda_atp=0.0, lambda_target=1.0).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rates: dict[float, list[Tensor]] = {2e-3: [], 2e-2: []}  # weights, biases of the thresholds
    for name, parameter in model.atp_patch_heads.named_parameters():
        parameter.requires_grad_(True)
        rates[2e-2 if "theta" in name and "bias" in name else 2e-3].append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]
    optimizer = torch.optim.Adam(groups)
    inputs = labelled(model, made.SAME_SIZE)
    averages = []
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        averages.append(atp_patch.last_trace(model).average_tokens)
    assert abs(averages[0] - 14) > 3
    model.eval()
    with torch.no_grad():
        model(**inputs)
    assert atp_patch.last_trace(model).average_tokens == pytest.approx(14, rel=0.1)


def test_unpatching_after_training_leaves_the_hosts_configs() -> None:
    model = learner("llava-llama").train()
    model(**labelled(model)).loss.backward()
    atp_patch.unpatch_model(model)
    config = model.model.language_model.config
    assert all(layer.self_attn.config is config for layer in model.model.language_model.layers)


def test_after_training_the_model_runs_plainly_and_on_text() -> None:
    model = learner("llava-llama")
    inputs = made.batch(model, made.MIXED)
    text = made.batch(model, made.NO_IMAGE)
    with torch.no_grad():
        before, plain = model(**inputs).logits, model(**text).logits
        model.train()
        model(**labelled(model))
        trained_text = model(**text).logits
        model.eval()
        after = model(**inputs).logits
    assert torch.equal(trained_text, plain)
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("share", "name", "other"), [(0, "redundant", "spatial"), (1, "spatial", "redundant")]
)
def test_a_score_can_be_left_out_for_good(share: float, name: str, other: str) -> None:
    """Whatever the thresholds have learned; its own thresholds learn nothing of the answers."""
    model = learner("llava-llama", spatial_share=share, lambda_sample=1.0).train()
    for parameter in model.atp_patch_heads.parameters():
        if parameter.dim() == 1 and parameter.numel() == 1:
            torch.nn.init.constant_(parameter, -1.0)  # low thresholds: both scores would keep much
    model(**labelled(model)).loss.backward()
    trace = atp_patch.last_trace(model)
    alive = trace.visual
    for layer in LAYERS:
        found = trace.layers[layer]
        by_score = found.scores[name] >= found.thresholds[name][:, None]
        assert torch.equal(found.kept & alive, by_score & alive)
        assert bool((found.scores[other] >= found.thresholds[other][:, None])[alive].any())
        alive = found.kept & alive
    learned = {
        n: float(p.grad.abs().sum())
        for n, p in model.atp_patch_heads.named_parameters()
        if p.grad is not None
    }
    assert all(
        (value > 0) == (name in n) for n, value in learned.items() if name in n or other in n
    )
    assert any(name in n for n in learned)
