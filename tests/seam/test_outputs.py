"""Behaviours 5 and 6: public shapes, labels, and what a caller may ask a forward pass for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Inputs, batch, extended, real_mask, visual_mask
from tests.helpers.oracle import attention_maps, masked_logits
from tests.helpers.run import METHODS, forward, generate, kept_of, new_ids, patched

families = pytest.mark.parametrize("kind", tiny.FAMILIES)
backends = pytest.mark.parametrize("attention", ["sdpa", "eager"])
paddings = pytest.mark.parametrize("padding", ["left", "right"])


def entering(kept: dict[int, Tensor], layer: int, real: Tensor) -> Tensor:
    """(B, L) bool: the tokens that enter a decoder layer."""
    passed = [step for step in kept if step <= layer]
    return kept[max(passed)] if passed else real


@paddings
@backends
@families
def test_hidden_states_have_public_length(kind: str, attention: str, padding: str) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention)
    inputs = batch(plain, prompts.MIXED, padding)
    states = forward(model, inputs, output_hidden_states=True).hidden_states
    kept = kept_of(model)
    expected = attention_maps(plain, inputs, kept).hidden_states
    assert len(states) == len(expected) == tiny.LAYERS + 1
    for layer, (ours, theirs) in enumerate(zip(states, expected, strict=True)):
        survivors = entering(kept, min(layer, tiny.LAYERS - 1), real_mask(inputs))
        assert_close(ours, theirs, survivors)


@paddings
@families
def test_attentions_have_public_shape(kind: str, padding: str) -> None:
    """Rows of survivors: their probabilities, with zeros where keys were pruned."""
    plain, model = tiny.tiny_model(kind, "eager"), patched(kind, "eager")
    inputs = batch(plain, prompts.MIXED, padding)
    maps = forward(model, inputs, output_attentions=True).attentions
    kept = kept_of(model)
    expected = attention_maps(plain, inputs, kept).attentions
    assert len(maps) == tiny.LAYERS
    for layer, (ours, theirs) in enumerate(zip(maps, expected, strict=True)):
        assert ours.shape == theirs.shape
        rows = entering(kept, layer, real_mask(inputs))
        assert_close(ours.transpose(1, 2), theirs.transpose(1, 2), rows)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@families
def test_attentions_while_generating_are_those_of_the_masked_model(kind: str, static: bool) -> None:
    """Each step's row of every layer, with zeros at the keys that were pruned."""
    plain, model = tiny.tiny_model(kind, "eager"), patched(kind, "eager")
    inputs = batch(plain, prompts.SAME_SIZE)
    wanted: dict[str, Any] = {"return_dict_in_generate": True, "output_attentions": True}
    if static:
        wanted["cache_implementation"] = "static"
    out = generate(model, inputs, 3, **wanted)
    kept = {
        layer: nn.functional.pad(rows, (0, 3), value=True) for layer, rows in kept_of(model).items()
    }
    whole = extended(inputs, new_ids(inputs, out.sequences))
    expected = attention_maps(plain, whole, kept).attentions
    length = inputs["input_ids"].shape[1]
    for step, maps in enumerate(out.attentions[1:]):
        for ours, theirs in zip(maps, expected, strict=True):
            row = theirs[:, :, length + step, : length + step + 1]
            assert static or ours.shape[-1] == row.shape[-1]
            assert_close(ours[:, :, 0, : row.shape[-1]], row)
            assert not ours[..., row.shape[-1] :].any()


@families
def test_hidden_states_while_generating(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    out = generate(model, inputs, 3, **wanted)
    assert torch.equal(out.sequences, generate(model, inputs, 3))
    for step, states in enumerate(out.hidden_states):
        length = inputs["input_ids"].shape[1] if step == 0 else 1
        assert {state.shape[:2] for state in states} == {(4, length)}


@backends
@families
def test_only_the_logits_asked_for(kind: str, attention: str) -> None:
    model = patched(kind, attention)
    inputs = batch(model, prompts.MIXED)
    whole = forward(model, inputs).logits
    assert_close(forward(model, inputs, logits_to_keep=1).logits, whole[:, -1:])
    assert_close(forward(model, inputs, logits_to_keep=3).logits, whole[:, -3:])
    chosen = torch.tensor([whole.shape[1] - 4, whole.shape[1] - 1])
    assert_close(forward(model, inputs, logits_to_keep=chosen).logits, whole[:, chosen])


@backends
@families
def test_outputs_as_a_tuple(kind: str, attention: str) -> None:
    model = patched(kind, attention)
    inputs = batch(model, prompts.MIXED)
    whole = forward(model, inputs)
    out = forward(model, inputs, return_dict=False)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], whole.logits)
    named = forward(model, inputs, return_dict=False, output_hidden_states=True)
    assert any(isinstance(part, tuple) and len(part) == tiny.LAYERS + 1 for part in named)


@families
def test_the_base_model_prunes_too(kind: str) -> None:
    """Without the language-model head, as people use it for embeddings."""
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    logits = forward(model, inputs).logits
    states = forward(model.model, inputs).last_hidden_state
    assert states.shape[:2] == logits.shape[:2]
    with torch.no_grad():
        assert_close(model.lm_head(states), logits, kept_of(model)[6])


def shifted_loss(logits: Tensor, labels: Tensor, predicting: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and count, of labels whose predicting place is in the mask."""
    targets = labels[:, 1:].masked_fill(~predicting[:, :-1], -100)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return losses.sum(), (targets != -100).sum()


def all_labels(inputs: Inputs) -> Tensor:
    """Every real token supervised: also those predicted from visual places."""
    return inputs["input_ids"].masked_fill(~real_mask(inputs), -100)


@paddings
@backends
@families
def test_no_loss_from_pruned_places(kind: str, attention: str, padding: str) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention)
    inputs = batch(plain, prompts.MIXED, padding)
    labels = all_labels(inputs)
    out = forward(model, inputs, labels=labels)
    kept = kept_of(model)
    total, count = shifted_loss(masked_logits(plain, inputs, kept), labels, kept[6])
    assert_close(out.loss, total / count)
    assert out.logits.shape[:2] == labels.shape
    _, whole = shifted_loss(out.logits, labels, real_mask(inputs))
    assert count < whole, "no label was dropped: this shows nothing"
    scaled = forward(model, inputs, labels=labels, num_items_in_batch=torch.tensor(50))
    assert_close(scaled.loss, total / 50)
    assert torch.equal(labels, all_labels(inputs)), "the caller's labels were changed"


@families
def test_loss_on_answers_is_of_the_public_logits(kind: str) -> None:
    """Labels on text after the images: nothing is dropped, everything lines up."""
    model = patched(kind)
    inputs = batch(model, prompts.RAGGED)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    out = forward(model, inputs, labels=labels)
    total, count = shifted_loss(out.logits, labels, real_mask(inputs))
    assert count == 6
    assert_close(out.loss, total / count)


@families
def test_keeping_all_has_the_plain_loss(kind: str) -> None:
    plain, model = tiny.tiny_model(kind), patched(kind, **{**METHODS["fastv"], "keep": 1.0})
    inputs = batch(plain, prompts.MIXED)
    labels = all_labels(inputs)
    ours, theirs = (forward(one, inputs, labels=labels).loss for one in (model, plain))
    assert torch.equal(ours, theirs)


@families
def test_gradients_flow_through_survivors(kind: str) -> None:
    """The loss of a pruned model has the masked model's gradients."""
    model = patched(kind)
    inputs = batch(model, prompts.RAGGED)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    early = tiny.decoder_layers(model)[0].mlp.up_proj.weight.grad
    assert early is not None
    assert early.isfinite().all()
    assert early.abs().max() > 0


@families
def test_embeddings_with_pixels(kind: str) -> None:
    """``inputs_embeds`` whose placeholders are embeddings: right, or refused by name."""
    model = patched(kind)
    inputs = batch(model, prompts.SINGLE)
    expected = forward(model, inputs).logits
    embedded: dict[str, Any] = dict(inputs)
    embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
    if "mm_token_type_ids" in inputs:
        embedded["position_ids"] = qwen_positions(model, inputs)
    try:
        actual = forward(model, embedded).logits
    except atp_patch.ATPError:
        return
    assert_close(actual, expected)


@families
def test_embeddings_without_pixels(kind: str) -> None:
    """Merged embeddings do not say what is visual: plain, or refused by name; never wrong."""
    plain, model = tiny.tiny_model(kind), patched(kind)
    inputs = batch(plain, prompts.SINGLE)
    merged = forward(plain, inputs, output_hidden_states=True).hidden_states[0]
    text = {"inputs_embeds": merged, "attention_mask": inputs["attention_mask"]}
    if "mm_token_type_ids" in inputs:
        text["position_ids"] = qwen_positions(plain, inputs)
    try:
        actual = forward(model, text).logits
    except atp_patch.ATPError:
        return
    assert_close(actual, forward(plain, inputs).logits)


def qwen_positions(model: Any, inputs: Inputs) -> Tensor:
    """(3, B, L) M-RoPE ids, which the model cannot work out from embeddings."""
    grids = {name: inputs[name] for name in ("image_grid_thw", "attention_mask")}
    ids, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
    return ids


@families
def test_an_image_that_text_does_not_follow(kind: str) -> None:
    """A prompt that ends with its image: the last token is no text token after it."""
    plain = tiny.tiny_model(kind)
    inputs = batch(plain, [prompts.prompt(prompts.Words(4), prompts.Image(4, 6), seed=1)])
    if kind == "qwen2_vl":  # without the end marker
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = inputs[name][:, :-1]
    for method, options in METHODS.items():
        model = patched(kind, **options)
        logits = forward(model, inputs).logits
        kept = kept_of(model)
        counts = [(kept[layer] & visual_mask(inputs)).sum().item() for layer in kept]
        total = visual_mask(inputs).sum().item()
        assert counts == [total // 2, total // 4, total // 12], method
        assert_close(logits, masked_logits(plain, inputs, kept), kept[6])


@families
def test_generate_shows_the_signature_of_the_class(kind: str) -> None:
    plain, model = tiny.tiny_model(kind), patched(kind)
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)
    assert model.generate.__name__ == "generate"
