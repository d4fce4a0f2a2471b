"""Behaviours 1, 2 and 4: keep-all is plain, gathered is masked, a batch is its samples."""

from __future__ import annotations

import pytest
import torch

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice
from tests.helpers.inputs import Inputs, batch, real_mask, visual_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.pairing import pairs
from tests.helpers.run import FASTV, METHODS, Session, forward, generate, kept_of, patched, words

EVERY = (*tiny.ALL_KINDS, tiny.WINDOWED)
backends = pytest.mark.parametrize("attention", ["sdpa", "eager"])
paddings = pytest.mark.parametrize("padding", ["left", "right"])
every_way = pairs(kind=EVERY, attention=["sdpa", "eager"], padding=["left", "right"])


def check_masked(model: object, plain: object, inputs: Inputs) -> None:
    """The patched model's logits are the masked plain model's wherever a token survived."""
    logits = forward(model, inputs).logits
    kept = kept_of(model)
    visual, survivors = visual_mask(inputs), kept[max(kept)]
    assert survivors[real_mask(inputs) & ~visual].all(), "text was pruned"
    assert not (survivors & ~real_mask(inputs)).any(), "padding was kept"
    if visual.any():
        assert (visual & ~survivors).any(), "nothing was pruned: this shows nothing"
    assert_close(logits, masked_logits(plain, inputs, kept), survivors)


@every_way
def test_keeping_all_is_plain_bit_for_bit(kind: str, attention: str, padding: str) -> None:
    plain = tiny.tiny_model(kind, attention)
    model = patched(kind, attention, **{**FASTV, "keep": 1.0})
    inputs = batch(plain, prompts.MIXED, padding)
    expected, actual = forward(plain, inputs), forward(model, inputs)
    assert torch.equal(actual.logits, expected.logits)
    for ours, theirs in zip(
        actual.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert torch.equal(kept_of(model)[6], real_mask(inputs))


@pairs(kind=tiny.FAMILIES, method=METHODS, attention=["sdpa", "eager"])
def test_keeping_all_is_plain_with_every_method(kind: str, method: str, attention: str) -> None:
    plain = tiny.tiny_model(kind, attention)
    model = patched(kind, attention, **{**METHODS[method], "keep": 1.0})
    inputs = batch(plain, prompts.TWO_IMAGES)
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)


@backends
@pytest.mark.parametrize("kind", EVERY)
def test_keeping_all_generates_plain(kind: str, attention: str) -> None:
    plain = tiny.tiny_model(kind, attention)
    model = patched(kind, attention, **{**FASTV, "keep": 1.0})
    inputs = batch(plain, prompts.MIXED)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    expected, actual = (generate(one, inputs, **wanted) for one in (plain, model))
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))


@every_way
def test_gathered_is_masked(kind: str, attention: str, padding: str) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention)
    check_masked(model, plain, batch(plain, prompts.MIXED, padding))


@pairs(kind=tiny.FAMILIES, method=METHODS, attention=["sdpa", "eager"])
def test_gathered_is_masked_with_every_method(kind: str, method: str, attention: str) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention, **METHODS[method])
    check_masked(model, plain, batch(plain, prompts.RAGGED))


@pytest.mark.parametrize(
    "case", [prompts.SINGLE, prompts.TWO_IMAGES, prompts.SAME_SIZE], ids=["one", "two", "pair"]
)
@backends
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_gathered_is_masked_without_padding(
    kind: str, attention: str, case: tuple[prompts.Prompt, ...]
) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention)
    inputs = batch(plain, case)
    check_masked(model, plain, inputs)
    del inputs["attention_mask"]  # as people call it who have one sample
    unmasked = forward(model, inputs).logits
    with_mask = forward(model, batch(plain, case)).logits
    assert_close(unmasked, with_mask)


@paddings
@pytest.mark.parametrize("kind", tiny.QWEN)
def test_gathered_is_masked_with_videos(kind: str, padding: str) -> None:
    plain, model = tiny.tiny_model(kind), patched(kind)
    check_masked(model, plain, batch(plain, prompts.VIDEO, padding))


@pytest.mark.parametrize("layers", [[1], [7], [1, 2, 3], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_gathered_is_masked_at_any_layers(kind: str, layers: list[int]) -> None:
    options = {"method": "fastv", "layers": layers, "keep": 0.75}
    plain, model = tiny.tiny_model(kind), patched(kind, **options)
    check_masked(model, plain, batch(plain, prompts.MIXED))


def test_padding_beyond_need_changes_nothing() -> None:
    for kind in tiny.FAMILIES:
        plain, model = tiny.tiny_model(kind), patched(kind)
        for padding in ("left", "right"):
            check_masked(model, plain, batch(plain, prompts.RAGGED, padding, pad_by=9))


@every_way
def test_a_batch_is_its_samples_alone(kind: str, attention: str, padding: str) -> None:
    check_batch(kind, attention, padding, METHODS["fastv"])


@paddings
@pytest.mark.parametrize("method", [name for name in METHODS if name != "fastv"])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_a_batch_is_its_samples_with_every_method(kind: str, method: str, padding: str) -> None:
    check_batch(kind, "sdpa", padding, METHODS[method])


def check_batch(kind: str, attention: str, padding: str, options: dict) -> None:
    """Choice, prefill and decoding of every sample are what they are without the others."""
    model = patched(kind, attention, **options)
    inputs = batch(model, prompts.MIXED, padding)
    together = Session(model, inputs)
    kept = kept_of(model)
    after = together.feed(words(4, 2))
    for b, prompt in enumerate(prompts.MIXED):
        real = real_mask(inputs)[b]
        single = batch(model, [prompt])
        alone = Session(model, single)
        if visual_mask(single).any():
            chosen = kept_of(model)
            for layer, mask in kept.items():
                assert_same_choice(mask[b, real][None], chosen[layer])
        survivors = kept[max(kept)][b, real][None]
        assert_close(together.logits[b, real][None], alone.logits, survivors)
        # Upstream measures sliding windows in places, padding between prompt and answer included.
        if not (kind == tiny.WINDOWED and padding == "right"):
            assert_close(after[b][None], alone.feed(words(4, 2)[b][None]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_text_alone_is_plain(kind: str, attention: str) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention)
    for padding in ("left", "right"):
        inputs = batch(plain, prompts.NO_IMAGE, padding)
        assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    inputs = batch(plain, prompts.NO_IMAGE)
    assert torch.equal(generate(model, inputs), generate(plain, inputs))
    with pytest.raises(atp_patch.ATPError):
        atp_patch.last_trace(model)


@paddings
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_later_layers_carry_survivors_only(kind: str, padding: str) -> None:
    """Tokens are really gone: from the hidden states, with the prompt's padding, and the cache."""
    model = patched(kind)
    inputs = batch(model, prompts.MIXED, padding)
    lengths: list[int] = []
    for layer in tiny.decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    cache = forward(model, inputs, use_cache=True).past_key_values
    kept, whole = kept_of(model), inputs["input_ids"].shape[1]
    needed = [kept[layer].sum(1).max().item() for layer in (2, 4, 6)]
    expected = [whole] * 2 + [needed[0]] * 2 + [needed[1]] * 2 + [needed[2]] * 2
    assert lengths == expected
    assert [layer.keys.shape[2] for layer in cache.layers] == expected
    assert cache.get_seq_length() == whole
