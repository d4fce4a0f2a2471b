"""The losses of the budget (eq. 12-13): their values, and what they move."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.maths import atp_loss, layer_averages, target_loss
from tests.core.test_learning import KINDS, labelled, learner


def test_losses_by_hand() -> None:
    totals = torch.tensor([576.0, 100.0])
    counts = [torch.tensor([126.0, 50.0]), torch.tensor([88.0, 25.0]), torch.tensor([20.0, 5.0])]
    layers = [4, 14, 24]
    expected = ((4 * 126 + 14 * 88 + 24 * 20) / 576 + (4 * 50 + 14 * 25 + 24 * 5) / 100) / 2
    assert float(atp_loss(counts, totals, layers)) == pytest.approx(expected)
    first, second = 143.875, (4 * 100 + 10 * 50 + 10 * 25 + 8 * 5) / 32
    average = (first + second) / 2
    found = layer_averages(counts, totals, layers, 32)
    assert found.tolist() == pytest.approx([first, second])
    paper = target_loss(found, totals.mean(), 100.0, "paper")
    smooth = target_loss(found, totals.mean(), 100.0, "smooth")
    assert float(paper) == pytest.approx(abs(average - 100))
    assert float(smooth) == pytest.approx(500 * ((average - 100) / 338) ** 2)
    unbiased = target_loss(found, totals.mean(), 100.0, "unbiased")
    assert float(unbiased) == pytest.approx(500 * (first - 100) * (second - 100) / 338**2)
    with pytest.raises(ValueError, match="paper, smooth or unbiased"):
        target_loss(found, totals.mean(), 100.0, "cubic")


def test_an_unbiased_target_loss_has_the_mean_of_the_square_over_all_data() -> None:
    """Over all batches of three among five samples; the square itself adds their variance."""
    samples = torch.tensor([3.0, 9.0, 14.0, 20.0, 35.0], dtype=torch.float64)
    total, target = torch.tensor(40.0), 11.0
    off = samples - target
    pairs = [off[i] * off[j] for i in range(5) for j in range(5) if i != j]
    whole = 500 * float(torch.stack(pairs).mean()) / 40**2
    batches = [samples[list(chosen)] for chosen in combinations(range(5), 3)]

    def mean(kind: str) -> float:
        losses = [target_loss(batch, total, target, kind) for batch in batches]
        return float(torch.stack(losses).mean())

    assert mean("unbiased") == pytest.approx(whole)
    assert mean("smooth") == pytest.approx(whole + 500 * float(samples.var()) / 3 / 40**2)
    alone = samples[:1]
    assert target_loss(alone, total, target, "unbiased") == target_loss(
        alone, total, target, "smooth"
    )


@pytest.mark.parametrize("way", ["all", "biases"])
def test_given_thresholds_pass_through_a_model_in_training(way: str) -> None:
    """A control has nothing to learn, and stands in for heads in training mode too."""
    model = learner("llava-llama", target_tokens=9, budget_gradient=way)
    control = atp_patch.threshold_control(model, [labelled(model)], "mean")
    with atp_patch.controlled(model, control), torch.no_grad():
        model.eval()(**labelled(model))
        gathered = atp_patch.last_trace(model).tokens_per_layer
        model.train()(**labelled(model))
        assert torch.equal(atp_patch.last_trace(model).tokens_per_layer, gathered)


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_may_move_biases_alone(kind: str) -> None:
    """Weights then learn what they learn without a budget, biases what they learn with one."""
    gradients: dict[tuple[str, float], dict[str, Tensor]] = {}
    losses = {}
    for way, weight in (("all", 0.0), ("all", 0.7), ("biases", 0.7)):
        model = learner(
            kind, target_tokens=9, lambda_atp=weight, lambda_target=weight, budget_gradient=way
        ).train()
        loss = model(**labelled(model)).loss
        loss.backward()
        losses[way, weight] = float(loss.detach())
        heads = model.atp_patch_heads.named_parameters()
        gradients[way, weight] = {name: p.grad for name, p in heads if p.grad is not None}
    assert losses["biases", 0.7] == losses["all", 0.7]
    found = gradients["biases", 0.7]
    for name, gradient in found.items():
        bias = name.startswith("theta") and name.endswith("bias")
        same, other = gradients["all", 0.7][name], gradients["all", 0.0][name]
        if not bias:
            same, other = other, same
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-7, msg=name)
        assert not torch.allclose(gradient, other, rtol=1e-2, atol=1e-7), name
