"""VoCo tokens learn in the model's own forward: alone, or beside LoRA and the model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.tools.parameter_groups import add_lora, freeze
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Inputs, batch
from tests.helpers.run import forward, positioned
from tests.helpers.voco import voco_model

families = pytest.mark.parametrize("kind", tiny.FAMILIES)
TOKENS = "atp_patch_heads.embedding"


def labelled(model: Any) -> Inputs:
    """The last three words of every sample are its answer."""
    inputs = batch(model, prompts.MIXED)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


def reached(model: Any) -> set[str]:
    """Parameters with a gradient that is not zero."""
    found = model.named_parameters()
    return {n for n, p in found if p.grad is not None and bool(p.grad.abs().sum() > 0)}


@families
def test_gradients_reach_the_tokens_alone(kind: str) -> None:
    model = voco_model(kind).train()
    freeze(model, freeze_lm=True)
    model(**labelled(model)).loss.backward()
    assert reached(model) == {TOKENS}
    assert bool((model.atp_patch_heads.embedding.grad.abs().sum(1) > 0).all())


@families
def test_gradients_reach_the_image_through_the_tokens_alone(kind: str) -> None:
    """Without a way from them to the text, nothing of the image would be learned."""
    model = voco_model(kind).train()
    freeze(model, freeze_lm=True)
    inputs = labelled(model)
    pixels = inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_()
    model(**inputs).loss.backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
    cut = voco_model(kind)
    layers = tiny.decoder_layers(cut)
    seen = []
    runs: list[Any] = []
    cut.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: runs.append(kwargs["atp_patch_pass"].decoder_pass), with_kwargs=True
    )

    def stop(_: Any, args: Any, kwargs: Any) -> Any:
        # VoCo tokens of zeros that stay zeros: text then knows nothing of the image.
        mask = kwargs["attention_mask"].clone()
        voco = runs[-1].sequence.voco >= 0
        blind = voco[:, None, :, None] & ~torch.eye(voco.shape[1], dtype=torch.bool)
        seen.append(int(voco.sum()))
        return args, {**kwargs, "attention_mask": mask & ~blind}

    for layer in layers:
        layer.register_forward_pre_hook(stop, with_kwargs=True)
    pixels = inputs["pixel_values"] = inputs["pixel_values"].detach().requires_grad_()
    loss = cut(**inputs).loss
    (gradient,) = torch.autograd.grad(loss, pixels, allow_unused=True)
    assert len(seen) == len(layers)
    assert seen[0] == 8
    assert gradient is None or float(gradient.abs().max()) == 0


@families
def test_gradients_reach_lora_beside_them(kind: str) -> None:
    pytest.importorskip("peft")
    model = voco_model(kind)
    freeze(model, freeze_lm=True)
    add_lora(model, 2, 8.0)
    model.train()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {TOKENS} | {n for n in learns if "lora_" in n}
    losses = steps(model, 12)
    assert losses[-1] < 0.7 * losses[0]
    assert {name for name in reached(model) if "lora_B" in name}
    model.eval()
    together = batch(model, prompts.MIXED)
    assert torch.equal(
        model.generate(**together, max_new_tokens=4, do_sample=False),
        model.generate(**together, max_new_tokens=4, do_sample=False, use_cache=False),
    )


def steps(model: Any, count: int) -> list[float]:
    """Losses of a plain loop with the package's own parameter groups."""
    groups = atp_patch.parameter_groups(model, lr=1e-2, atp_lr=1e-1)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for _ in range(count):
        loss = model(**labelled(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@families
def test_the_tokens_learn_and_travel(kind: str, tmp_path: Path) -> None:
    model = voco_model(kind).train()
    freeze(model, freeze_lm=True)
    before = model.atp_patch_heads.embedding.detach().clone()
    losses = steps(model, 15)
    assert losses[-1] < losses[0] - 0.1
    assert not torch.allclose(model.atp_patch_heads.embedding, before)
    assert TOKENS in model.state_dict()
    atp_patch.save_pretrained(model, tmp_path)
    other = atp_patch.patch_model(tiny.tiny_model(kind), weights=tmp_path)
    inputs = batch(model, prompts.MIXED)
    assert torch.equal(forward(other, inputs).logits, forward(model.eval(), inputs).logits)


@families
def test_learning_through_the_cache(kind: str) -> None:
    """The image once and its question after it: the gradients of one pass over both."""
    inputs = positioned(voco_model(kind), batch(tiny.tiny_model(kind), prompts.SINGLE))
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    gradients = []
    for apart in (False, True):
        model = voco_model(kind).train()
        freeze(model, freeze_lm=True)
        if apart:
            text = inputs["input_ids"].shape[1]
            read = {k: v[..., :-6] if v.shape[-1] == text else v for k, v in inputs.items()}
            cache = model(**read, use_cache=True).past_key_values
            start = read["input_ids"].shape[1]
            if kind == "qwen2_vl":
                start += int(model.model.rope_deltas)
            places = torch.arange(start, start + 6)[None]
            if kind == "qwen2_vl":
                places = places.expand(4, 1, -1)
            rest = {"input_ids": inputs["input_ids"][:, -6:], "position_ids": places}
            mask = inputs["attention_mask"]
            loss = model(
                **rest, attention_mask=mask, labels=labels[:, -6:], past_key_values=cache
            ).loss
        else:
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients.append(model.atp_patch_heads.embedding.grad)
    assert float(gradients[0].abs().max()) > 0
    assert_close(gradients[1], gradients[0])


@families
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = voco_model(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**labelled(model), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in itertools.zip_longest(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
