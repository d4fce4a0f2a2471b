"""Training as other programs do it: checkpoints around layers, generating, copies, LoRA, pairs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import atp_patch
from tests.core.test_learning import KINDS, LAYERS, labelled, learner
from tests.helpers import inputs as made
from tests.helpers.run import generate
from tests.helpers.tiny import decoder_layers, tiny_model

kinds = pytest.mark.parametrize("kind", KINDS)


def gradients(model: Any) -> dict[str, Any]:
    model(**labelled(model), use_cache=False).loss.backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in model.named_parameters()
    }


@kinds
@pytest.mark.parametrize("learns", ["heads", "all"])
def test_checkpoints_around_layers_replay_their_hooks(kind: str, learns: str) -> None:
    """As FSDP's wrapper makes them, and transformers itself did until 5.13."""
    found = []
    for wrapped in (False, True):
        model = learner(kind).train()
        if learns == "heads":
            model.requires_grad_(False)
            model.atp_patch_heads.requires_grad_(True)
        if wrapped:
            layers = set(decoder_layers(model))
            apply_activation_checkpointing(model, check_fn=layers.__contains__)
        found.append(gradients(model))
    plain, wrapped = found
    assert set(plain) == set(wrapped)
    assert any(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        assert (gradient is None) == (wrapped[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(wrapped[name], gradient, rtol=1e-4, atol=1e-6)


@kinds
def test_generating_in_training_is_generating(kind: str) -> None:
    """As reinforcement learning does; no pass of it counts as one of training."""
    model = learner(kind, slope=10, slope_end=100.0, anneal_passes=5)
    inputs = made.batch(model, made.MIXED)
    expected = generate(model, inputs)
    kept = atp_patch.last_trace(model).layers[6].kept_counts
    model.train()
    assert torch.equal(generate(model, inputs), expected)
    assert atp_patch.last_trace(model).layers[6].kept_counts == kept
    assert int(model.atp_patch_heads.passes) == 0


def test_a_model_in_training_can_be_copied() -> None:
    model = learner("llava-llama").train()
    inputs = labelled(model)
    loss = model(**inputs).loss
    other = copy.deepcopy(model)
    loss.backward()
    assert torch.equal(other(**inputs).loss, loss)
    assert float(loss.detach()) > 0
    with pytest.raises(atp_patch.NotPatchedError, match="image"):
        atp_patch.last_trace(copy.deepcopy(model))


def test_a_pair_learns() -> None:
    """Its budget is of what enters the decoder, as at inference."""
    model = tiny_model("llava-llama")
    torch.manual_seed(0)
    options = {"thresholds": "learned", "reference_grid": 6, "target_loss": "paper"}
    pair = ["prumerge+", "atp"]
    atp_patch.patch_model(model, LAYERS, pair, lambda_target=1.0, lambda_atp=0.0, **options)
    inputs = labelled(model)
    with torch.no_grad():
        model(**inputs)
    kept = [atp_patch.last_trace(model).layers[i].kept_counts for i in (0, *LAYERS)]
    model.train()
    out = model(**inputs)
    trace = atp_patch.last_trace(model)
    assert [trace.layers[i].kept_counts for i in (0, *LAYERS)] == kept
    seen = [b for b, total in enumerate(trace.layout.totals) if total]
    entered = [kept[0][b] for b in seen]
    assert 0 < sum(entered) < sum(trace.layout.totals)
    rows = trace.tokens_per_layer[seen].float()
    goal = 0.25 * sum(entered) / len(entered)
    assert trace.losses["target"] == pytest.approx(abs(float(rows.mean()) - goal), rel=1e-4)
    out.loss.backward()
    for name, parameter in model.atp_patch_heads.named_parameters():
        assert parameter.grad is not None, name


def test_a_loss_made_elsewhere_lists_no_terms() -> None:
    """As with label smoothing, where the trainer takes the labels away."""
    model = learner("llava-llama").train()
    inputs = labelled(model)
    model(**inputs)
    assert atp_patch.last_trace(model).losses
    del inputs["labels"]
    model(**inputs)
    assert not atp_patch.last_trace(model).losses


def test_lora_in_all_linear_layers_leaves_the_heads_alone() -> None:
    peft = pytest.importorskip("peft")
    model = learner("llava-llama")
    inputs = made.batch(model, made.SINGLE)
    with torch.no_grad():
        expected = model(**inputs).logits
    keys = set(model.atp_patch_heads.state_dict())
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])
    )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert set(model.atp_patch_heads.state_dict()) == keys
