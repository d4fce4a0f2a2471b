"""Methods of one's own that learn, that are calibrated, and that remember from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atp_patch
from atp_patch.methods import keep_best, minimum_counts
from tests.core.test_learning import labelled
from tests.helpers import inputs as made
from tests.helpers.compare import assert_close, assert_same_choice
from tests.helpers.inputs import real_mask
from tests.helpers.run import forward, generate, kept_of
from tests.helpers.tiny import tiny_model

LAYERS = [2, 4, 6]
kinds = pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])


class Biases(atp_patch.LearnedThresholds):
    """One number for each pruning layer."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers)
        self.bias = nn.ParameterDict({str(i): nn.Parameter(torch.zeros(())) for i in layers})

    @torch.no_grad()
    def shift(self, layer: int, by: float) -> None:
        self.bias[str(layer)].add_(by)


@dataclass(frozen=True)
class Loud(atp_patch.LayerMethod):
    """Tokens whose features are louder than a learned threshold."""

    name = "loud"
    summary = "the norm of the features against a learned threshold"
    weight: float = 0.5

    @property
    def needs_budget(self) -> bool:
        return False

    @property
    def takes_budget(self) -> bool:
        return False

    def build(self, spec: Any) -> nn.Module:
        return Biases(spec.layers)

    def scored(self, view: atp_patch.View) -> Tensor:
        norm = view.features.detach().float().norm(dim=-1)
        left = view.slot_valid.sum(1, keepdim=True).clamp(min=1)
        mean = norm.sum(1, keepdim=True) / left
        return torch.sigmoid(4 * (norm / mean.clamp(min=1e-6) - 1))

    def decide(self, view: atp_patch.View, module: Any) -> atp_patch.Decision:
        score = self.scored(view)
        theta = torch.sigmoid(module.bias[str(view.layer)]).expand(len(score))
        best = keep_best(view, score, minimum_counts(view))
        keep = view.slot_valid & ((score >= theta[:, None]) | best)
        relaxed = torch.sigmoid((score - theta[:, None]) * 20)
        soft = (keep.float() - relaxed).detach() + relaxed
        soft = soft.masked_fill(~view.slot_valid, 0.0)
        return atp_patch.Decision(
            keep, scores={"norm": score}, thresholds={"norm": theta}, soft=soft
        )

    def losses(self, counts: Any, totals: Any, layers: Any, num_layers: int, target: float) -> Any:
        """As methods of the first release have them."""
        return {"share": (self.weight, (counts[-1] / totals).mean())}


def own(kind: str, method: Any = None, **options: Any) -> Any:
    return atp_patch.patch_model(tiny_model(kind), LAYERS, method or Loud(), **options)


def batches(model: Any) -> list[Any]:
    prompts = [
        made.prompt(made.Words(3), made.Image(6 + 2 * (s % 2), 6), made.Words(5 + s), seed=20 + s)
        for s in range(6)
    ]
    return [made.batch(model, prompts[i : i + 2], "right") for i in range(0, 6, 2)]


@kinds
@pytest.mark.parametrize("target", [16, 24])
def test_any_learned_thresholds_are_calibrated(kind: str, target: int, tmp_path: Path) -> None:
    model = own(kind)
    data = batches(model)
    found = atp_patch.calibrate(model, data, target)
    assert found.after == pytest.approx(target, rel=0.01)
    assert abs(found.before - target) > 0.01 * target
    for layer, by in found.shifts.items():
        assert model.atp_patch_heads.bias[str(layer)].item() == pytest.approx(by, abs=1e-5)
    averages = []
    for batch in data:
        forward(model, batch)
        averages.append(atp_patch.last_trace(model).tokens_per_layer.double().mean(1))
    assert float(torch.cat(averages).mean()) == pytest.approx(found.after)
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(tiny_model(kind), weights=tmp_path)
    assert torch.equal(forward(again, data[0]).logits, forward(model, data[0]).logits)


def test_margins_in_a_unit_of_ones_own() -> None:
    class Decibels(Loud):
        """Its threshold is a plain number, and so is what calibration adds to it."""

        def decide(self, view: Any, module: Any) -> atp_patch.Decision:
            score = 4 * self.scored(view)
            theta = module.bias[str(view.layer)].expand(len(score)) + 2
            keep = view.slot_valid & (score >= theta[:, None])
            keep |= keep_best(view, score, minimum_counts(view))
            return atp_patch.Decision(keep, scores={"n": score}, thresholds={"theta": theta})

        def margins(self, decision: atp_patch.Decision) -> Tensor:
            return decision.scores["n"] - decision.thresholds["theta"][:, None]

    model = own("llava-llama", Decibels())
    assert atp_patch.calibrate(model, batches(model), 18).after == pytest.approx(18, rel=0.01)
    nameless = own("llava-llama", Decibels())
    with pytest.raises(atp_patch.ConfigError, match="controls for the learned thresholds of atp"):
        atp_patch.threshold_control(nameless, batches(nameless), "mean")


def test_scores_without_a_threshold_of_their_name_are_named() -> None:
    class Apart(Loud):
        def decide(self, view: Any, module: Any) -> atp_patch.Decision:
            right = super().decide(view, module)
            return atp_patch.Decision(right.keep, scores={"other": right.scores["norm"]})

    model = own("llava-llama", Apart())
    with pytest.raises(atp_patch.ConfigError, match=r"loud returns no score .* margins\(\)"):
        atp_patch.calibrate(model, batches(model), 16)


# -- losses ---------------------------------------------------------------------------------------


@kinds
def test_losses_of_counts_alone_are_added_as_before(kind: str) -> None:
    model = own(kind).train()
    loss = model(**labelled(model)).loss
    parts = atp_patch.last_trace(model).losses
    silent = own(kind, Loud(weight=0.0)).train()
    plain = silent(**labelled(silent)).loss
    assert float(loss - plain) == pytest.approx(0.5 * parts["share"], abs=1e-5)
    loss.backward()
    for bias in model.atp_patch_heads.bias.values():
        assert bias.grad is not None
        assert bias.grad.abs() > 0


@dataclass(frozen=True)
class Watched(Loud):
    """Its losses look at everything that they may."""

    name = "watched"

    def step_losses(self, step: atp_patch.LearningStep) -> dict[str, tuple[float, Tensor]]:
        assert sorted(step.views) == sorted(step.decisions) == list(step.layers) == LAYERS
        last = step.layers[-1]
        view, decision = step.views[last], step.decisions[last]
        assert view.learning
        assert torch.equal(decision.scores["norm"], self.scored(view))
        gone = (1 - decision.soft) * decision.scores["norm"] * view.slot_valid
        entropy = -(step.output.logits.softmax(-1) * step.output.logits.log_softmax(-1)).sum(-1)
        assert step.output.loss is not None
        assert step.totals.shape == step.samples.shape == step.counts[0].shape
        return {
            "gone": (0.1, gone[step.samples].sum(1).mean()),
            "entropy": (0.01, entropy.mean()),
            **super().step_losses(step),
        }


@kinds
@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_see_views_decisions_and_the_output(kind: str, checkpointed: bool) -> None:
    model = own(kind, Watched())
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    inputs = labelled(model)
    out = model(**inputs)
    parts = atp_patch.last_trace(model).losses
    assert set(parts) == {"gone", "entropy", "share"}
    silent = own(kind, Loud(weight=0.0)).train()
    plain = silent(**labelled(silent))
    expected = 0.1 * parts["gone"] + 0.01 * parts["entropy"] + 0.5 * parts["share"]
    assert float(out.loss - plain.loss) == pytest.approx(expected, abs=1e-4)
    entropy = -(plain.logits.softmax(-1) * plain.logits.log_softmax(-1)).sum(-1).mean()
    assert parts["entropy"] == pytest.approx(float(entropy), rel=1e-4)
    out.loss.backward()
    assert all(bias.grad.abs() > 0 for bias in model.atp_patch_heads.bias.values())


# -- state ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembers(atp_patch.LayerMethod):
    """Ranks by the sum of what this and the earlier pruning layers saw."""

    name = "remembers"
    summary = "norms of the features, summed over the pruning layers so far"

    def decide(self, view: atp_patch.View, module: Any) -> atp_patch.Decision:
        score = view.features.float().norm(dim=-1)
        if "sum" in view.state:
            score = score + view.of_token(view.state["sum"])
        view.state["sum"] = view.to_table(score)
        return atp_patch.Decision(keep_best(view, score), scores={"sum": score})


def by_hand(model: Any, inputs: Any) -> dict[int, Tensor]:
    """(B, L) sums of norms, from the hidden states that the model itself gives back."""
    states = forward(model, inputs, output_hidden_states=True).hidden_states
    sums, total = {}, torch.zeros(inputs["input_ids"].shape)
    for layer in LAYERS:
        total = total + states[layer].float().norm(dim=-1)
        sums[layer] = total
    return sums


@kinds
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_layer_method_carries_its_state(kind: str, padding: str) -> None:
    model = own(kind, Remembers(), keep=0.5)
    inputs = made.batch(model, made.MIXED, padding)
    expected = by_hand(model, inputs)
    trace = atp_patch.last_trace(model)
    for layer in LAYERS:
        found = trace.layers[layer].scores["sum"]
        assert_close(found, expected[layer], ~found.isnan())
    for earlier, later in pairwise(LAYERS):
        kept = trace.layers[earlier].kept & trace.visual
        assert torch.equal(~trace.layers[later].scores["sum"].isnan(), kept)


@kinds
def test_state_is_of_one_pass_and_one_sample(kind: str) -> None:
    model = own(kind, Remembers(), keep=0.5)
    inputs = made.batch(model, made.MIXED)
    together, kept = forward(model, inputs).logits, kept_of(model)
    assert torch.equal(forward(model, inputs).logits, together)
    real = real_mask(inputs)
    for b, one in enumerate(made.MIXED):
        alone = forward(model, made.batch(model, (one,))).logits
        if (inputs["input_ids"][b] == 5).any():
            for layer, mask in kept_of(model).items():
                assert_same_choice(mask, kept[layer][b, real[b]][None])
        assert_close(together[b, real[b]][None], alone, kept[6][b, real[b]][None])
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


def test_the_arguments_of_a_picture_methods_grid_have_any_names() -> None:
    """Methods that were written when the fourth was called ``least`` work as they did."""

    @dataclass(frozen=True)
    class Halved(atp_patch.PictureMethod):
        name, summary = "halved", "half as many rows and columns"

        def grid(
            self, height: int, width: int, count: int, least: int, *, square: bool
        ) -> tuple[int, int]:
            assert 1 <= least <= count
            return height // 2, width // 2

    model = atp_patch.patch_model(tiny_model("llava-llama"), method=Halved(), keep=0.25)
    forward(model, made.batch(model, made.SINGLE))
    trace = atp_patch.last_trace(model)
    assert trace.average_tokens == trace.visual.sum() / 4


class FormerName(Remembers):
    """Reads the smallest number of tokens of an image by its former name."""

    def decide(self, view: atp_patch.View, module: Any) -> atp_patch.Decision:
        with pytest.warns(DeprecationWarning, match="min_tokens_per_image"):
            assert view.min_per_image == view.min_tokens_per_image == 3
        return super().decide(view, module)


def test_the_former_name_of_the_minimum_of_an_image() -> None:
    model = own("llava-llama", FormerName(), keep=0.5, min_tokens_per_image=3)
    forward(model, made.batch(model, made.SINGLE))
    assert atp_patch.last_trace(model).layers


def test_the_former_name_of_minimum_counts() -> None:
    with pytest.warns(DeprecationWarning, match="minimum_counts"):
        assert atp_patch.methods.least_counts is minimum_counts
