"""Budgets met after training, and thresholds without their adaptivity at the same budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.tools import calibration
from tests.core.test_learning import LAYERS, learner
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model

KINDS = ["llava-llama", "qwen2_vl"]
NAMES = ("redundant", "spatial")


def batches(model: Any, count: int = 8) -> list[dict[str, Tensor]]:
    """Two samples a batch of several sizes, and one batch of text alone."""
    prompts = [
        made.prompt(made.Words(3), made.Image(6 + 2 * (s % 2), 6), made.Words(5 + s), seed=20 + s)
        for s in range(count)
    ]
    pairs = [made.batch(model, prompts[i : i + 2], "right") for i in range(0, count, 2)]
    return [*pairs, made.batch(model, made.NO_IMAGE)]


def measured(model: Any, data: list[dict[str, Tensor]]) -> tuple[float, dict[int, Tensor]]:
    """Average tokens, and (samples, 2) logits of each layer's thresholds."""
    rows, thetas = [], {layer: [] for layer in LAYERS}
    with torch.no_grad():
        for batch in data[:-1]:
            model(**batch)
            trace = atp_patch.last_trace(model)
            rows.append(trace.tokens_per_layer.double().mean(1))
            for layer, found in thetas.items():
                pair = [trace.layers[layer].thresholds[name] for name in NAMES]
                found.append(torch.stack(pair, 1).logit())
    return float(torch.cat(rows).mean()), {i: torch.cat(found) for i, found in thetas.items()}


def test_batches_of_embeddings_are_seen_too() -> None:
    model = tiny_model("llava-llama")
    inputs = made.batch(model, made.SINGLE)
    mask = made.visual_mask(inputs)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        found = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    embeds = embeds.masked_scatter(mask[..., None], torch.cat(tuple(found)))
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    options = {"thresholds": "learned", "reference_grid": 6}
    atp_patch.patch_model(model, [2, 4], family="generic", target_tokens=20, **options)
    batch = {**given, "visual_mask": mask}
    with torch.no_grad():
        model(**batch)
    own = atp_patch.last_trace(model).average_tokens
    found = atp_patch.calibrate(model, [batch], own)
    assert (found.samples, found.after) == (1, own)


def test_nothing_is_done_while_nothing_is_pruned() -> None:
    model = learner("llava-llama")
    with atp_patch.disabled(model), pytest.raises(atp_patch.ConfigError, match="outside it"):
        atp_patch.calibrate(model, batches(model, 2), 20)
    atp_patch.patch_model(tiny := tiny_model("llava-llama"), method="voco")
    inputs = made.batch(tiny, made.SINGLE)
    with atp_patch.disabled(tiny), pytest.raises(atp_patch.ConfigError, match="leave it first"):
        atp_patch.compress(tiny, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [14, 30])
def test_the_average_meets_the_target(kind: str, target: int, tmp_path: Path) -> None:
    model = learner(kind)
    data = batches(model)
    before, thetas = measured(model, data)
    found = atp_patch.calibrate(model, iter(data), target)
    after, shifted = measured(model, data)
    assert found.target == target
    assert found.samples == 8
    assert (found.before, found.after) == pytest.approx((before, after))
    assert after == pytest.approx(target, rel=0.01)
    assert abs(before - target) > 0.01 * target
    # The first layer's inputs are what they were: every instance moves by the same number.
    moved = shifted[LAYERS[0]] - thetas[LAYERS[0]]
    torch.testing.assert_close(
        moved, torch.full_like(moved, found.shifts[LAYERS[0]]), atol=1e-3, rtol=1e-3
    )

    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(tiny_model(kind), weights=tmp_path)
    assert measured(again, data)[0] == after
    assert atp_patch.patching.api.require_patch(again).config.target_tokens == target
    assert f"{target} visual tokens" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("share", [0, 1])
def test_a_score_that_was_left_out_spares_nothing(share: int) -> None:
    """Whatever its thresholds say: low ones here, which would keep much."""
    model = learner("llava-llama", spatial_share=share, lambda_sample=1.0)
    for parameter in model.atp_patch_heads.parameters():
        if parameter.dim() == 1 and parameter.numel() == 1:
            torch.nn.init.constant_(parameter, -1.0)
    data = batches(model)
    atp_patch.calibrate(model, data, 14)
    assert measured(model, data)[0] == pytest.approx(14, rel=0.01)


def test_a_calibration_that_is_broken_off_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learner("llava-llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data, meet = batches(model), calibration.meet_count

    def broken(*args: Any) -> float:
        meet(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "meet_count", broken)
    with pytest.raises(KeyboardInterrupt):
        atp_patch.calibrate(model, data, 14)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_untrained_heads_too_and_training_goes_on_as_before() -> None:
    model = tiny_model("llava-llama")
    atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6)
    model.train()
    model.model.vision_tower.eval()
    found = atp_patch.calibrate(model, batches(model), 16)
    assert found.after == pytest.approx(16, rel=0.01)
    assert model.training
    assert not model.model.vision_tower.training


@pytest.mark.parametrize("budget", [{"target_tokens": 16}, {"keep": 0.5}])
def test_the_patchs_own_budget_is_the_default(budget: dict[str, float]) -> None:
    model = learner("llava-llama", **budget)
    before = atp_patch.patching.api.require_patch(model).config
    expected = 16 if "keep" not in budget else 36 * (2 + 2 * 0.5 + 2 * 0.25 + 2 * 0.125) / 8
    found = atp_patch.calibrate(model, batches(model))
    assert found.target == pytest.approx(expected)
    assert found.after == pytest.approx(expected, rel=0.01)
    assert atp_patch.patching.api.require_patch(model).config == before


def test_behind_a_method_that_prunes_before_the_decoder() -> None:
    model = tiny_model("llava-llama")
    torch.manual_seed(0)
    options = {"thresholds": "learned", "reference_grid": 6, "target_tokens": 14}
    atp_patch.patch_model(model, LAYERS, ["prumerge+", "atp"], **options)
    data = batches(model)
    with torch.no_grad():
        model(**data[0])
    entering = float(atp_patch.last_trace(model).tokens_per_layer[:, 0].double().mean())
    assert entering < 36
    target = 0.6 * entering
    assert atp_patch.calibrate(model, data, target).after == pytest.approx(target, rel=0.01)
    assert measured(model, data)[0] == pytest.approx(target, rel=0.01)


def test_what_cannot_be_met_is_refused_and_changes_nothing() -> None:
    model = learner("llava-llama")
    data = batches(model)
    before = {name: value.clone() for name, value in model.atp_patch_heads.state_dict().items()}
    for target in (5, 37):
        with pytest.raises(atp_patch.BudgetError, match=f"target_tokens={target} is not between"):
            atp_patch.calibrate(model, data, target)
    with pytest.raises(atp_patch.InputError, match="no batch has images"):
        atp_patch.calibrate(model, data[-1:], 14)
    for name, value in model.atp_patch_heads.state_dict().items():
        assert torch.equal(value, before[name])
    budget = atp_patch.patch_model(tiny_model("llava-llama"), LAYERS, target_tokens=14)
    with pytest.raises(atp_patch.ConfigError, match="no learned thresholds"):
        atp_patch.calibrate(budget, data, 14)


def test_scores_that_tie_too_much_are_named() -> None:
    """Thresholds of nothing but a staircase of spatial scores."""
    model = learner("llava-llama", spatial_order="strided")
    with torch.no_grad():
        for layer in LAYERS:
            heads = model.atp_patch_heads
            for part, bias in ((heads.theta_redundant, 30.0), (heads.theta_spatial, 0.0)):
                part[str(layer)].weight.zero_()
                part[str(layer)].bias.fill_(bias)
    before = {name: value.clone() for name, value in model.atp_patch_heads.state_dict().items()}
    with pytest.raises(atp_patch.ConfigError, match=r"the nearest .* spatial_share"):
        atp_patch.calibrate(model, batches(model), 13)
    for name, value in model.atp_patch_heads.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_mean_thresholds_keep_as_many_and_are_the_same_for_all(kind: str) -> None:
    model = learner(kind)
    data = batches(model)
    own, thetas = measured(model, data)
    assert all(float(table.std(0).max()) > 0.05 for table in thetas.values())
    control = atp_patch.threshold_control(model, data, "mean")
    with atp_patch.controlled(model, control):
        average, tables = measured(model, data)
    assert average == pytest.approx(own, rel=0.02)
    first = LAYERS[0]
    mean = thetas[first].sigmoid().mean(0).logit()
    shift = tables[first][0] - mean
    torch.testing.assert_close(shift[0], shift[1], rtol=0, atol=1e-3)
    for table in tables.values():
        torch.testing.assert_close(table, table[:1].expand_as(table))
    assert measured(model, data)[0] == own


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_thresholds_are_those_of_others(kind: str, tmp_path: Path) -> None:
    model = learner(kind)
    data = batches(model, 12)
    own, thetas = measured(model, data)
    control = atp_patch.threshold_control(model, data, "shuffled")
    with atp_patch.controlled(model, control):
        average, tables = measured(model, data)
        alone = [measured(model, [{**batch}, {}]) for batch in data[:-1]]
        atp_patch.save_pretrained(model, tmp_path)
    assert average == pytest.approx(own, rel=0.05)
    donors = []
    for layer in LAYERS:
        spread = thetas[layer] - thetas[layer].mean(0)
        given = tables[layer][:, None] - thetas[layer][None]
        # A row given differs from one of the own rows by the same shift in both thresholds.
        apart = (given[..., 0] - given[..., 1]).abs()
        donors.append(apart.argmin(1))
        assert float(apart.min(1).values.max()) < 1e-3
        assert float(spread.std()) > 0.05
    assert all(torch.equal(donor, donors[0]) for donor in donors)
    assert len(set(donors[0].tolist())) > 3
    assert int((donors[0] == torch.arange(12)).sum()) < 6
    together = torch.cat([rows[LAYERS[0]] for _, rows in alone])
    assert torch.equal(together, tables[LAYERS[0]])
    again = atp_patch.patch_model(tiny_model(kind), weights=tmp_path)
    assert measured(again, data)[0] == own


def test_controls_are_checked() -> None:
    model = learner("llava-llama")
    data = batches(model)
    with pytest.raises(atp_patch.ConfigError, match="mean, shuffled"):
        atp_patch.threshold_control(model, data, "median")
    control = atp_patch.threshold_control(model, data, "mean")
    other = atp_patch.patch_model(tiny_model("llava-llama"), [3], thresholds="learned")
    with (
        pytest.raises(atp_patch.ConfigError, match=r"for layers \[2, 4, 6\]"),
        atp_patch.controlled(other, control),
    ):
        pass
