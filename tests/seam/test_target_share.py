"""A budget as a share of each sample's visual tokens, for pictures of several sizes."""

from __future__ import annotations

import pytest

import atp_patch
from atp_patch.patching.config import BaseModel, PruningConfig
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.inputs import batch, visual_mask
from tests.helpers.run import forward

KIND = "qwen2_vl"  # its pictures have a number of tokens that follows from their size
LAYERS = 8


def kept(inputs, **asked):
    """For each sample, its visual tokens and what each layer carries of them."""
    model = atp_patch.patch_model(tiny.tiny_model(KIND), **asked)
    forward(model, inputs(model))
    trace = atp_patch.last_trace(model)
    return list(trace.layout.totals), trace.tokens_per_layer.tolist()


def mixed(model):
    return batch(model, prompts.MIXED, "left")


def test_each_sample_keeps_its_share_on_average():
    totals, layers = kept(mixed, layers=[2, 5], method="fastv", target_share=0.5)
    assert len({total for total in totals if total}) > 1
    for total, row in zip(totals, layers, strict=True):
        assert sum(row) / LAYERS == pytest.approx(0.5 * total, abs=0.5)


def test_it_is_the_budget_in_tokens_of_each_sample():
    config = PruningConfig("atp", (4, 14, 24), BaseModel("llava", 32, 4096), target_share=0.15)
    for total in (144, 576, 2880):
        in_tokens = PruningConfig(
            "atp", (4, 14, 24), BaseModel("llava", 32, 4096), target_tokens=0.15 * total
        )
        assert config.counts(total) == in_tokens.counts(total)
        assert config.goal(total) == in_tokens.goal(total)


def test_it_is_the_share_that_a_door_method_lets_in():
    totals, layers = kept(mixed, method="divprune", target_share=0.25)
    for total, row in zip(totals, layers, strict=True):
        assert row == [round(0.25 * total)] * LAYERS


def test_a_pair_meets_it_over_the_whole_prompt():
    totals, layers = kept(mixed, method=["divprune", "fastv"], layers=[2], target_share=0.3)
    for total, row in zip(totals, layers, strict=True):
        assert row[0] < total or not total
        assert sum(row) / LAYERS == pytest.approx(0.3 * total, abs=1)


def test_a_method_on_the_tower_keeps_it_of_each_picture():
    model = atp_patch.patch_model(tiny.tiny_model(KIND), method="prumerge", target_share=0.5)
    inputs = mixed(model)
    forward(model, inputs)
    trace = atp_patch.last_trace(model)
    whole = visual_mask(inputs).sum(1).tolist()
    left = trace.tokens_per_layer[:, 0].tolist()
    assert left == pytest.approx([0.5 * total for total in whole], abs=2)


def test_an_adapter_keeps_it(tmp_path):
    model = atp_patch.patch_model(tiny.tiny_model(KIND), layers=[2, 5], target_share=0.4)
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(tiny.tiny_model(KIND), weights=tmp_path)
    assert "40 % of the visual tokens" in (tmp_path / "README.md").read_text(encoding="utf-8")
    for each in (model, again):
        forward(each, mixed(each))
    first, second = (atp_patch.last_trace(each).tokens_per_layer for each in (model, again))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("asked", [{"keep": 0.5}, {"target_tokens": 10}])
def test_two_budgets_are_refused(asked):
    with pytest.raises(atp_patch.ConfigError, match="both set the budget"):
        atp_patch.patch_model(tiny.tiny_model(KIND), layers=[2], target_share=0.5, **asked)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "half", True])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(atp_patch.ConfigError, match="target_share"):
        atp_patch.patch_model(tiny.tiny_model(KIND), layers=[2], target_share=share)


def test_a_share_below_what_the_first_layers_cost_is_refused():
    with pytest.raises(atp_patch.BudgetError, match=r"target_share=0\.1 .* least possible"):
        atp_patch.patch_model(tiny.tiny_model("llava-llama"), layers=[4], target_share=0.1)
