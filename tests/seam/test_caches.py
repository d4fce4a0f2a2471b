"""Behaviour 3: the choice lives with the cache, whatever is done with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.caches import quantized_cache
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Image, Words, batch, extended, prompt, real_mask
from tests.helpers.oracle import Kept, attention_maps, masked_logits
from tests.helpers.pairing import pairs
from tests.helpers.run import Session, forward, kept_of, patched, positioned, words

EVERY = [*tiny.ALL_KINDS, tiny.WINDOWED]
WITH_WINDOW = [*tiny.FAMILIES, tiny.WINDOWED]
families = pytest.mark.parametrize("kind", tiny.FAMILIES)
with_window = pytest.mark.parametrize("kind", WITH_WINDOW)
paddings = pytest.mark.parametrize("padding", ["left", "right"])


def check(session: Session, kind: str, kept: Kept, answers: list[Tensor]) -> None:
    """All that was fed after the prompt got the masked full-length model's logits."""
    fed = torch.cat(answers, 1)
    expected = session.reference(tiny.tiny_model(kind), kept)[:, -fed.shape[1] :]
    assert_close(fed, expected)


def talk(session: Session, *lengths: int, seed: int = 0) -> list[Tensor]:
    """Feed messages of these lengths one after the other."""
    people = len(session.inputs["input_ids"])
    return [session.feed(words(people, n, seed + at)) for at, n in enumerate(lengths)]


@pairs(kind=EVERY, attention=["sdpa", "eager"], padding=["left", "right"])
def test_decoding_by_hand_is_masked(kind: str, attention: str, padding: str) -> None:
    """Single steps and messages of several tokens, on ragged batches padded on either side."""
    model = patched(kind, attention)
    session = Session(model, batch(model, prompts.MIXED, padding))
    kept = kept_of(model)
    check(session, kind, kept, [session.feed(session.next_ids()), *talk(session, 1, 4, 1, 2)])


def test_a_dropped_key_shows_in_decoding() -> None:
    """The check above can fail: one key more or less is far more than rounding."""
    model = patched("qwen2_vl")
    session = Session(model, batch(model, prompts.SINGLE))
    kept = kept_of(model)
    answers = talk(session, 1, 2)
    check(session, "qwen2_vl", kept, answers)
    wrong = {layer: mask.clone() for layer, mask in kept.items()}
    wrong[6][0, kept[6][0].nonzero()[5]] = False
    with pytest.raises(AssertionError, match="differs by"):
        check(session, "qwen2_vl", wrong, answers)


@pytest.mark.parametrize(
    ("kind", "given"),
    # A cache without a config knows no sliding window: wrong in the plain model too.
    [(kind, given) for kind in tiny.FAMILIES for given in ("nothing", "lazy", "configured")]
    + [(tiny.WINDOWED, given) for given in ("nothing", "configured")],
)
def test_any_dynamic_cache_will_do(kind: str, given: str) -> None:
    model = patched(kind)
    cache: Any = {
        "nothing": lambda: None,
        "lazy": DynamicCache,
        "configured": lambda: DynamicCache(config=model.config),
    }[given]()
    session = Session(model, batch(model, prompts.MIXED), cache)
    check(session, kind, kept_of(model), talk(session, 1, 3))


@paddings
@families
def test_a_static_cache_by_hand(kind: str, padding: str) -> None:
    model = patched(kind)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=120)
    session = Session(model, batch(model, prompts.MIXED, padding), cache)
    check(session, kind, kept_of(model), talk(session, 1, 1, 3, 1))


@with_window
def test_two_caches_in_turn_do_not_disturb_each_other(kind: str) -> None:
    model = patched(kind)
    first = Session(model, batch(model, prompts.MIXED))
    first_kept = kept_of(model)
    first_answers = talk(first, 1)
    second = Session(model, batch(model, prompts.RAGGED, "right"))
    second_kept = kept_of(model)
    second_answers = []
    for turn in range(3):
        second_answers += talk(second, 1, seed=10 + turn)
        first_answers += talk(first, 2, seed=20 + turn)
        forward(model, batch(model, prompts.TWO_IMAGES), use_cache=False)
        forward(model, batch(model, prompts.NO_IMAGE))
    check(first, kind, first_kept, first_answers)
    check(second, kind, second_kept, second_answers)


@with_window
def test_a_deep_copy_of_a_cache_goes_its_own_way(kind: str) -> None:
    model = patched(kind)
    session = Session(model, batch(model, prompts.MIXED))
    kept = kept_of(model)
    answers = talk(session, 2)
    twin = session.fork()
    twin_answers = [*answers, *talk(twin, 1, 3, seed=30)]
    answers += talk(session, 2, 1, seed=40)
    check(session, kind, kept, answers)
    check(twin, kind, kept, twin_answers)


def crop_and_go_on(session: Session, kind: str) -> None:
    """Say something, take it back, and say something else on the same cache."""
    kept = kept_of(session.model)
    answers = talk(session, 3)
    before = dict(session.inputs)
    talk(session, 4, seed=50)
    session.cache.crop(-4)
    session.inputs = before
    check(session, kind, kept, [*answers, *talk(session, 2, 1, seed=60)])


@families
def test_cropping_forgets_the_last_tokens(kind: str) -> None:
    model = patched(kind)
    crop_and_go_on(Session(model, batch(model, prompts.MIXED)), kind)


@pytest.mark.skipif(
    not hasattr(StaticLayer, "crop"), reason="static caches cannot be cropped before 5.24"
)
@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
def test_cropping_a_static_cache_forgets_the_last_tokens(kind: str) -> None:
    model = patched(kind)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=120)
    session = Session(model, batch(model, prompts.MIXED), cache)
    crop_and_go_on(session, kind)
    with pytest.raises(atp_patch.ATPError, match="that would be dropped are pruned"):
        session.cache.crop(-70)


@pytest.mark.parametrize(
    ("way", "order"),
    [("reorder", [1, 0]), ("reorder", [1, 1]), ("select", [1, 1]), ("select", [0])],
)
@families
def test_rows_of_a_cache_are_chosen(kind: str, way: str, order: list[int]) -> None:
    """As beam search and contrastive search do it."""
    model = patched(kind)
    case = prompts.SAME_SIZE
    session = Session(model, batch(model, case))
    kept = {layer: mask[order] for layer, mask in kept_of(model).items()}
    message = words(2, 2, seed=70)
    session.feed(message)
    if way == "reorder":
        session.cache.reorder_cache(torch.tensor(order))
    else:
        session.cache.batch_select_indices(torch.tensor(order))
    session.inputs = extended(batch(model, [case[b] for b in order]), message[order])
    session.deltas = session.deltas[order]
    check(session, kind, kept, talk(session, 1, 2, seed=80))


@families
def test_rows_of_a_cache_are_repeated(kind: str) -> None:
    model = patched(kind)
    session = Session(model, batch(model, prompts.RAGGED))
    kept = {layer: mask.repeat_interleave(2, 0) for layer, mask in kept_of(model).items()}
    session.cache.batch_repeat_interleave(2)
    session.inputs = batch(model, [one for one in prompts.RAGGED for _ in range(2)])
    session.deltas = session.deltas.repeat_interleave(2, 0)
    check(session, kind, kept, talk(session, 1, 2))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@families
def test_a_reset_cache_is_a_fresh_one(kind: str, static: bool) -> None:
    model = patched(kind)
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=120) if static else DynamicCache(config=config)
    talk(Session(model, batch(model, prompts.RAGGED), cache), 2)
    cache.reset()
    session = Session(model, batch(model, prompts.SAME_SIZE), cache)
    check(session, kind, kept_of(model), talk(session, 1, 2))


@families
def test_a_cache_reports_its_public_length(kind: str) -> None:
    model = patched(kind)
    session = Session(model, batch(model, prompts.MIXED))
    length = session.inputs["input_ids"].shape[1]
    for fed in (1, 4):
        talk(session, fed)
        length += fed
        assert session.cache.get_seq_length() == length
        assert {session.cache.get_seq_length(layer) for layer in range(tiny.LAYERS)} == {length}


@pytest.mark.parametrize("kind", ["llava-llama", tiny.WINDOWED])
@pytest.mark.parametrize("first", [prompts.SINGLE, prompts.NO_IMAGE], ids=["image", "text"])
def test_an_image_in_a_later_turn(kind: str, first: tuple[prompts.Prompt, ...]) -> None:
    """A conversation goes on with another image: right, or refused by name."""
    model = patched(kind, "eager")
    session = Session(model, batch(model, first))
    kept = kept_of(model) if first is prompts.SINGLE else {}
    start = session.inputs["input_ids"].shape[1]
    turn = batch(
        model, [prompt(Words(2), Image(), Words(5), seed=90 + b) for b in range(len(first))]
    )
    whole = {
        name: torch.cat([session.inputs[name], turn[name]], 1)
        for name in ("input_ids", "attention_mask")
    }
    pixels = [one["pixel_values"] for one in (session.inputs, turn) if "pixel_values" in one]
    message = {"input_ids": turn["input_ids"], "pixel_values": turn["pixel_values"]}
    text = positioned(model, whole)["position_ids"][:, start:]
    try:
        out = forward(
            model,
            {**message, "attention_mask": whole["attention_mask"], "position_ids": text},
            past_key_values=session.cache,
            use_cache=True,
            output_attentions=True,
        )
    except atp_patch.ATPError:
        return
    later = kept_of(model)
    for layer, mask in later.items():
        if mask.shape[1] < whole["input_ids"].shape[1]:
            earlier = kept.get(layer, real_mask(session.inputs))
            later[layer] = torch.cat([earlier, mask], 1)
    full = {**whole, "pixel_values": torch.cat(pixels)}
    plain = tiny.tiny_model(kind)
    expected = masked_logits(plain, positioned(model, full), later)
    assert_close(out.logits, expected[:, start:], later[6][:, start:])
    maps = attention_maps(plain, positioned(model, full), later).attentions
    for layer, (ours, theirs) in enumerate(zip(out.attentions, maps, strict=True)):
        assert ours.shape == theirs[:, :, start:].shape
        passed = [step for step in later if step <= layer]
        rows = later[max(passed)] if passed else real_mask(full)
        actual, wanted = (one.transpose(1, 2) for one in (ours, theirs[:, :, start:]))
        assert_close(actual, wanted, rows[:, start:])


@families
def test_a_quantized_cache_is_refused_by_name(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.SINGLE)
    with pytest.raises(atp_patch.ATPError, match="uantized"):
        forward(model, inputs, past_key_values=quantized_cache(model), use_cache=True)


def test_decoding_on_a_pruned_cache_needs_no_patch_state() -> None:
    """The choice is in the cache: another patched copy of the model goes on with it."""
    session = Session(patched("llava-llama"), batch(patched("llava-llama"), prompts.MIXED))
    kept = kept_of(session.model)
    session.model = patched("llava-llama")
    check(session, "llava-llama", kept, talk(session, 1, 3))


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=120),
}


@pytest.mark.parametrize("prompt_of", [prompts.SINGLE, prompts.MIXED], ids=["single", "ragged"])
@pytest.mark.parametrize("reader", ["unpatched", "plain"])
@pytest.mark.parametrize("cache", CACHES)
@families
def test_a_model_without_a_patch_cannot_go_on_with_a_pruned_prompt(
    kind: str, cache: str, reader: str, prompt_of: tuple[prompts.Prompt, ...]
) -> None:
    """It would read the keys that are left as those of other positions."""
    model = patched(kind)
    session = Session(model, batch(model, prompt_of), CACHES[cache](model))
    people = len(session.inputs["input_ids"])
    session.feed(words(people, 2))
    twin = session.fork()
    with atp_patch.disabled(model):
        twin.feed(words(people, 1))
    if reader == "unpatched":
        atp_patch.unpatch_model(model)
    else:
        session.model = tiny.tiny_model(kind)
    with pytest.raises(atp_patch.CacheError, match="not patched"):
        session.feed(words(people, 1))


@pytest.mark.parametrize("cache", CACHES)
@families
def test_a_model_without_a_patch_reads_what_was_not_pruned(kind: str, cache: str) -> None:
    model = patched(kind)
    with atp_patch.disabled(model):
        session = Session(model, batch(model, prompts.SAME_SIZE), CACHES[cache](model))
    session.model = tiny.tiny_model(kind)
    check(session, kind, {}, talk(session, 1, 2))
