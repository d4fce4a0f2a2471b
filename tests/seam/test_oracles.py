"""The references themselves: right on the plain model, and able to tell a wrong key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import inputs as prompts
from tests.helpers import oracle, tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import batch, real_mask, visual_mask
from tests.helpers.run import LAYERS, Session, forward, generate, words

EVERY = (*tiny.ALL_KINDS, tiny.WINDOWED)


def some_pruning(inputs: prompts.Inputs, layers: tuple[int, ...] = LAYERS) -> dict[int, Tensor]:
    """A made-up cumulative choice that keeps two thirds at every layer."""
    generator = torch.Generator().manual_seed(0)
    visual, alive, kept = visual_mask(inputs), real_mask(inputs), {}
    for layer in layers:
        alive = alive & (~visual | (torch.rand(visual.shape, generator=generator) < 2 / 3))
        kept[layer] = alive
    return kept


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", EVERY)
def test_masking_nothing_is_the_plain_model(kind: str, attention: str, padding: str) -> None:
    model = tiny.tiny_model(kind, attention)
    inputs = batch(model, prompts.MIXED, padding)
    expected = forward(model, inputs).logits
    assert_close(oracle.masked_logits(model, inputs, {}), expected, real_mask(inputs))


@pytest.mark.parametrize("kind", tiny.QWEN)
def test_masking_nothing_with_videos_is_the_plain_model(kind: str) -> None:
    model = tiny.tiny_model(kind)
    inputs = batch(model, prompts.VIDEO)
    expected = forward(model, inputs).logits
    assert_close(oracle.masked_logits(model, inputs, {}), expected, real_mask(inputs))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", EVERY)
def test_one_wrong_key_shows(kind: str, layer: int) -> None:
    model = tiny.tiny_model(kind)
    inputs = batch(model, prompts.SINGLE)
    kept = some_pruning(inputs)
    last_seen = (visual_mask(inputs) & kept[LAYERS[-1]])[0].nonzero()[-1]
    wrong = {number: mask.clone() for number, mask in kept.items()}
    wrong[layer][0, last_seen] = False
    right_logits = oracle.masked_logits(model, inputs, kept)
    wrong_logits = oracle.masked_logits(model, inputs, wrong)
    assert (right_logits - wrong_logits)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", EVERY)
def test_a_wrong_position_shows(kind: str) -> None:
    """Survivors that were renumbered would turn their rotary embedding."""
    model = tiny.tiny_model(kind)
    inputs = batch(model, prompts.SINGLE)
    length = inputs["input_ids"].shape[1]
    text = torch.arange(length)[None]
    gap = torch.where(text > length // 2, text + 1, text)
    expected, shifted = (
        forward(model, inputs, position_ids=ids if tiny.is_llava(model) else ids.expand(4, 1, -1))
        for ids in (text, gap)
    )
    assert (expected.logits - shifted.logits)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", EVERY)
def test_maps_agree_with_each_other(kind: str) -> None:
    """The recomputed attention logits, masked and normalised, are the model's own probabilities."""
    model = tiny.tiny_model(kind)
    inputs = batch(model, prompts.MIXED)
    kept = some_pruning(inputs)
    maps = oracle.attention_maps(model, inputs, kept)
    window = tiny.WINDOW if kind == tiny.WINDOWED else None
    for layer, visible in [(1, real_mask(inputs)), (3, kept[2]), (7, kept[6])]:
        mask = oracle.additive_mask(visible, window, torch.float32)
        assert_close((maps.logits[layer] + mask).softmax(-1), maps.attentions[layer])


def test_attention_is_not_flat() -> None:
    """A choice by attention is far from a draw between equals."""
    for kind in tiny.FAMILIES:
        model = tiny.tiny_model(kind)
        inputs = batch(model, prompts.SINGLE)
        paid = oracle.attention_maps(model, inputs, {}).attentions[1].mean(1)[0, -1]
        scores = paid[visual_mask(inputs)[0]]
        assert scores.max() / scores.min() > 5


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", EVERY)
def test_feeding_by_hand_is_the_full_forward(kind: str, padding: str) -> None:
    """The position ids and masks of ``Session`` are right on the plain model."""
    model = tiny.tiny_model(kind)
    session = Session(model, batch(model, prompts.MIXED, padding))
    prompt_length = session.inputs["input_ids"].shape[1]
    answers = [session.feed(session.next_ids()), session.feed(words(4, 3))]
    expected = session.reference(model, {})
    assert_close(torch.cat(answers, 1), expected[:, prompt_length:])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beam", "sample"],
)
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_masked_generation_of_nothing_masked_is_plain(kind: str, options: dict) -> None:
    model = tiny.tiny_model(kind)
    inputs = batch(model, prompts.MIXED)
    torch.manual_seed(0)
    expected = oracle.masked_generate(
        model, inputs, {}, **{"max_new_tokens": 4, "do_sample": False, **options}
    )
    assert torch.equal(generate(model, inputs, **options), expected)
