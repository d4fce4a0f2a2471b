"""What callers bring: fresh caches, labels everywhere, masks that grow, padding, odd numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.inputs import Image, Words, batch, prompt, real_mask, visual_mask
from tests.helpers.run import FASTV, forward, generate, kept_of, patched
from tests.helpers.voco import voco_model

families = pytest.mark.parametrize("kind", tiny.FAMILIES)


@families
@pytest.mark.parametrize("make", [patched, voco_model])
def test_an_empty_cache_is_as_none(kind: str, make: Any) -> None:
    """In passes that are not pruned: text alone, and images while the patch is disabled."""
    plain, model = tiny.tiny_model(kind), make(kind)
    text = batch(plain, prompts.NO_IMAGE)
    expected = forward(plain, text).logits
    got = forward(model, text, past_key_values=DynamicCache(), use_cache=True).logits
    assert torch.equal(got, expected)
    images = batch(plain, prompts.MIXED)
    with atp_patch.disabled(model):
        got = forward(model, images, past_key_values=DynamicCache(), use_cache=True).logits
    assert torch.equal(got, forward(plain, images).logits)
    before = forward(model, images).logits
    cached = forward(model, images, past_key_values=DynamicCache(), use_cache=True).logits
    assert torch.equal(cached, before)


@families
def test_labels_that_tell_no_answer_change_no_choice(kind: str) -> None:
    """All text supervised: the choice is that of a call without labels."""
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    expected = kept_of(model)
    labels = inputs["input_ids"].masked_fill(visual_mask(inputs) | ~real_mask(inputs), -100)
    forward(model, inputs, labels=labels)
    for layer, kept in kept_of(model).items():
        assert torch.equal(kept, expected[layer])


@families
def test_an_image_behind_an_answer_is_asked_about(kind: str) -> None:
    """The choice is that of the prompt up to the last answer, as in that turn of a conversation."""
    model = patched(kind)
    talk = prompt(Words(3), Image(4, 6), Words(8), Image(4, 6), Words(9), seed=4)
    inputs = batch(model, (talk,))
    ids = inputs["input_ids"]
    images = visual_mask(inputs)[0].nonzero().flatten()
    gap = int((images[1:] - images[:-1] > 1).nonzero()[0])  # the last token of the first image
    labels = torch.full_like(ids, -100)
    first = int(images[gap]) + 5  # three words of question... and then the first answer
    labels[0, first : first + 3] = ids[0, first : first + 3]
    labels[0, -3:] = ids[0, -3:]
    forward(model, inputs, labels=labels)
    got = {layer: kept[:, :-3] for layer, kept in kept_of(model).items()}
    asked = {
        name: value[:, :-3] if value.shape[:2] == ids.shape else value
        for name, value in inputs.items()
    }
    forward(model, asked)
    for layer, kept in kept_of(model).items():
        assert torch.equal(kept, got[layer])


def test_a_visual_mask_of_the_prompt_serves_all_of_generate() -> None:
    """Without a cache the sequence grows, and with guesses it comes longer than the prompt."""
    model = tiny.tiny_model("llava-llama")
    inputs = batch(model, prompts.SINGLE)
    expected = generate(patched("llava-llama"), inputs)
    atp_patch.patch_model(model, **FASTV, family="generic")
    given = {**inputs, "visual_mask": visual_mask(inputs), "visual_grids": [[(1, 6, 6)]]}
    for way in (
        {},
        {"use_cache": False},
        {"assistant_model": tiny.tiny_model("llava-llama")},
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(generate(model, given, **way), expected), way


@families
def test_padding_is_no_text_with_a_static_cache(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    expected = generate(model, inputs)
    dynamic = atp_patch.last_trace(model)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
    static = atp_patch.last_trace(model)
    assert static.text_tokens == dynamic.text_tokens
    assert static.kv_bytes == dynamic.kv_bytes
    for layer, found in dynamic.layers.items():
        assert torch.equal(static.layers[layer].kept, found.kept)


def test_images_are_compressed_in_training_too() -> None:
    """Gradient checkpointing would keep no cache."""
    model = voco_model("llava-llama")
    inputs = batch(model, prompts.SINGLE)
    expected = atp_patch.compress(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = atp_patch.compress(model.train(), inputs)
    assert model.training
    assert got.tokens == expected.tokens
    model.eval()
    asked = [
        forward(model, one.inputs(model, torch.tensor([[7, 8]]))).logits for one in (expected, got)
    ]
    assert torch.equal(*asked)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(atp_patch.ConfigError, match="patch the model first"):
        atp_patch.patch_model(torch.compile(tiny.tiny_model("llava-llama")), [2], keep=0.5)


def test_what_is_kept_from_being_compiled_is_not_refused() -> None:
    model = tiny.tiny_model("llava-llama")
    model.forward = torch.compiler.disable(model.forward)
    assert atp_patch.patch_model(model, [2], keep=0.5) is model


@pytest.mark.parametrize("part", ["model", "forward", "decoder", "layer"])
def test_what_was_compiled_in_place_is_refused(part: str) -> None:
    model = tiny.tiny_model("llava-llama")
    decoder = model.get_decoder()
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        compiled = {"model": model, "decoder": decoder, "layer": decoder.layers[3]}[part]
        compiled.compile(backend="eager")
    with pytest.raises(atp_patch.ConfigError, match="patch the model first"):
        atp_patch.patch_model(model, [2], keep=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [2], "min_tokens": 2.5}, "min_tokens=2.5: give a whole number"),
        ({"layers": [2], "spatial_share": "0.5"}, "spatial_share='0.5': give a number"),
        ({"layers": [2], "thresholds": "learned", "reference_grid": 6.0}, "reference_grid=6.0"),
        ({"layers": [2], "standardise": 1}, "standardise=1: give True or False"),
        ({"layers": [2], "score": 1}, "score=1: give a word"),
        ({"method": "voco", "num_tokens": 2.0}, "num_tokens=2.0: give a whole number"),
        ({"layers": 2}, "layers=2: give a list"),
        ({"layers": [2.0]}, r"layers=\[2.0\]: give a list"),
        ({"layers": [2], "keep": "0.5"}, "keep='0.5': give a number"),
        ({"layers": [2], "target_tokens": "many"}, "target_tokens='many'"),
    ],
)
def test_what_is_no_number_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(atp_patch.ConfigError, match=message):
        atp_patch.patch_model(tiny.tiny_model("llava-llama"), **given)


def test_numbers_of_any_kind_are_saved(tmp_path: Any) -> None:
    for k, given in enumerate(
        (
            {"layers": np.array([2, 4]), "keep": np.float32(0.5)},
            {"layers": torch.tensor([2, 4]), "keep": np.array([0.5, 0.5], dtype=np.float32)},
            {"layers": [2, 4], "target_tokens": np.float64(18)},
        )
    ):
        model = atp_patch.patch_model(tiny.tiny_model("llava-llama"), **given)
        atp_patch.save_pretrained(model, tmp_path / str(k))
        inputs = batch(model, prompts.SINGLE)
        expected = forward(model, inputs).logits
        again = atp_patch.patch_model(tiny.tiny_model("llava-llama"), weights=tmp_path / str(k))
        assert torch.equal(forward(again, inputs).logits, expected)
