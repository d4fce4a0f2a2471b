"""VoCo tokens: masked as stated, evicted as masked, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.inputs import Image, Words, batch, prompt, real_mask
from tests.helpers.run import Session, forward, generate, new_ids, positioned, words
from tests.helpers.voco import reference, voco_model
from tests.seam.test_patching import check_restored, used

families = pytest.mark.parametrize("kind", tiny.FAMILIES)
backends = pytest.mark.parametrize("attention", ["sdpa", "eager"])
paddings = pytest.mark.parametrize("padding", ["left", "right"])


def plain(kind: str) -> Any:
    return tiny.tiny_model(kind, "eager")


@paddings
@backends
@families
def test_a_pass_is_the_plain_model_with_the_mask(kind: str, attention: str, padding: str) -> None:
    model = voco_model(kind, attention)
    inputs = positioned(model, batch(model, prompts.MIXED, padding))
    expected, known = reference(plain(kind), inputs, model.atp_patch_heads.embedding.detach())
    assert_close(forward(model, inputs).logits, expected, known)


@pytest.mark.parametrize("num_tokens", [1, 3])
@families
def test_eviction_is_masking(kind: str, num_tokens: int) -> None:
    """Further turns on the small cache are those of the masked model that keeps everything."""
    model = voco_model(kind, num_tokens=num_tokens)
    session = Session(model, batch(model, prompts.MIXED))
    images = [
        0 if b == 2 else sum(isinstance(p, Image) for p in one.pieces)
        for b, one in enumerate(prompts.MIXED)
    ]
    text = (real_mask(session.inputs) & ~prompts.visual_mask(session.inputs)).sum(1).tolist()
    longest = max(t + num_tokens * n for t, n in zip(text, images, strict=True))
    assert {layer.keys.shape[2] for layer in session.cache.layers} == {longest}
    assert session.cache.get_seq_length() == session.inputs["input_ids"].shape[1]
    for turn, count in enumerate((1, 3)):
        got = session.feed(words(4, count, turn))
        expected, known = reference(
            plain(kind),
            positioned(model, session.inputs),
            model.atp_patch_heads.embedding.detach(),
        )
        assert known[:, -count:].all()
        assert_close(got, expected[:, -count:])


def test_576_tokens_become_one() -> None:
    model = tiny.tiny_model("qwen2_vl")
    atp_patch.patch_model(model, method="voco")
    inputs = batch(model, (prompt(Words(2), Image(24, 24), Words(3)),))
    cache = forward(model, inputs, use_cache=True).past_key_values
    text = inputs["input_ids"].shape[1] - 576
    assert {layer.keys.shape[2] for layer in cache.layers} == {text + 1}
    trace = atp_patch.last_trace(model)
    assert trace.average_tokens == 1
    assert trace.decoder_tokens == (text + 577,)
    with pytest.warns(DeprecationWarning, match="decoder_tokens"):
        assert trace.slots == trace.decoder_tokens
    assert trace.kv_bytes == sum(2 * layer.keys.nbytes for layer in cache.layers)


@families
def test_a_batch_is_its_samples_alone(kind: str) -> None:
    model = voco_model(kind)
    together = batch(model, prompts.MIXED)
    ids = new_ids(together, generate(model, together))
    for b, one in enumerate(prompts.MIXED):
        alone = batch(model, (one,))
        assert torch.equal(new_ids(alone, generate(model, alone))[0], ids[b])


@families
def test_with_a_cache_as_without(kind: str) -> None:
    model = voco_model(kind)
    inputs = batch(model, prompts.MIXED)
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cached = generate(model, inputs, **options)
        assert torch.equal(cached, generate(model, inputs, use_cache=False, **options))


@families
def test_guessed_tokens_are_cropped(kind: str) -> None:
    model = voco_model(kind)
    inputs = batch(model, (prompt(Words(3), Image(4, 6), Words(12, period=3), seed=1),))
    guessed = generate(model, inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, generate(model, inputs))


@backends
@families
def test_unpatching_leaves_nothing(kind: str, attention: str) -> None:
    model = used(tiny.tiny_model(kind, attention))
    fresh, before = copy.deepcopy(model), snapshot(model)
    atp_patch.patch_model(model, method="voco", num_tokens=2)
    assert snapshot(model) != before
    used(model)
    atp_patch.unpatch_model(model)
    check_restored(model, fresh, before)


@families
def test_without_images_and_while_disabled_it_is_the_plain_model(kind: str) -> None:
    model, same = voco_model(kind), tiny.tiny_model(kind)
    text, inputs = batch(model, prompts.NO_IMAGE), batch(model, prompts.MIXED)
    assert torch.equal(forward(model, text).logits, forward(same, text).logits)
    with atp_patch.disabled(model):
        assert torch.equal(forward(model, inputs).logits, forward(same, inputs).logits)


@families
def test_a_copy_is_a_model_of_its_own(kind: str) -> None:
    model = voco_model(kind)
    inputs = batch(model, prompts.SINGLE)
    expected = forward(model, inputs).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.atp_patch_heads.embedding.zero_()
    assert not torch.allclose(forward(twin, inputs).logits, expected)
    assert torch.equal(forward(model, inputs).logits, expected)


@families
def test_hidden_states_and_attention_have_the_public_length(kind: str) -> None:
    model = voco_model(kind, "eager")
    inputs = batch(model, prompts.SINGLE)
    length = inputs["input_ids"].shape[1]
    out = forward(model, inputs, output_hidden_states=True, output_attentions=True)
    assert all(states.shape[1] == length for states in out.hidden_states)
    assert all(weights.shape[2:] == (length, length) for weights in out.attentions)
    visual = prompts.visual_mask(inputs)[0]
    first = int(visual.nonzero()[0])
    text = ~visual & (torch.arange(length) > first)
    voco = visual.nonzero().flatten()[-2:]
    seen = out.attentions[3][0].sum(0)[text]
    assert seen[:, voco].min() > 0
    visual[voco] = False
    assert (seen[:, visual] == 0).all()


def refused(error: type[Exception], words_in_it: str, **options: Any) -> None:
    model = tiny.tiny_model("llava-llama")
    with pytest.raises(error, match=words_in_it):
        atp_patch.patch_model(model, **{"method": "voco", **options})
    with pytest.raises(atp_patch.NotPatchedError):
        atp_patch.last_trace(model)


def test_wrong_arguments_are_refused() -> None:
    refused(atp_patch.ConfigError, "num_tokens", keep=0.5)
    refused(atp_patch.ConfigError, "num_tokens", target_tokens=10)
    refused(atp_patch.ConfigError, "min_tokens", min_tokens=3)
    refused(atp_patch.ConfigError, "layers", layers=[2])
    refused(atp_patch.ConfigError, "at least one", num_tokens=0)
    refused(atp_patch.ConfigError, "segment_frames", segment_frames=0)
    refused(atp_patch.ConfigError, "before the decoder", method=["voco", "fastv"], layers=[2])


@families
def test_what_cannot_be_compressed_is_refused(kind: str) -> None:
    model = voco_model(kind, num_tokens=40)
    inputs = batch(model, prompts.SINGLE)
    with pytest.raises(atp_patch.InputError, match="fewer num_tokens"):
        model(**inputs)
    atp_patch.patch_model(model, method="voco")
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with pytest.raises(atp_patch.CacheError, match="StaticCache"):
        forward(model, inputs, past_key_values=static)
    narrow = tiny.tiny_model(tiny.WINDOWED)
    atp_patch.patch_model(narrow, method="voco")
    with pytest.raises(atp_patch.CacheError, match="sliding window"):
        narrow(**batch(narrow, prompts.SINGLE))
