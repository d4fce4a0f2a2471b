"""``generate`` of a patched model is that of the masked full-length model, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import atp_patch
from tests.families.hosts import LOOKUP_NEEDS_AN_END, REPEATS_SAMPLES
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Image, Inputs, Words, batch, extended, prompt
from tests.helpers.oracle import masked_generate, masked_logits
from tests.helpers.run import METHODS, generate, kept_of, new_ids, patched, words

TOKENS = 7
backends = pytest.mark.parametrize("attention", ["sdpa", "eager"])
families = pytest.mark.parametrize("kind", tiny.FAMILIES)
ECHO = (Words(8, period=2), Image(4, 6), Words(14, period=4))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
}


def reference(kind: str, inputs: Inputs, kept: dict, **options: Any) -> torch.Tensor:
    """The masked plain model's sequences, at full length in every step."""
    torch.manual_seed(0)
    settings = {"max_new_tokens": TOKENS, "do_sample": False, **options}
    return masked_generate(tiny.tiny_model(kind), inputs, kept, **settings)


@pytest.mark.parametrize("mode", MODES)
@families
def test_every_mode_is_masked_generation(kind: str, mode: str) -> None:
    if "beam" in mode and kind != "qwen2_vl" and not REPEATS_SAMPLES:
        pytest.skip("this transformers repeats the images of beams one by one")
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    cached = generate(model, inputs, TOKENS, **MODES[mode])
    kept = kept_of(model)
    assert torch.equal(cached, reference(kind, inputs, kept, **MODES[mode]))
    plain = generate(tiny.tiny_model(kind), inputs, TOKENS, **MODES[mode])
    assert not torch.equal(cached, plain), "pruning changed nothing: this shows nothing"
    assert torch.equal(cached, generate(model, inputs, TOKENS, use_cache=False, **MODES[mode]))


@backends
@pytest.mark.parametrize("kind", [*tiny.ALL_KINDS, tiny.WINDOWED])
def test_every_steps_logits_are_masked(kind: str, attention: str) -> None:
    """Left-padded, ragged, greedy: all steps at once against one masked full-length forward."""
    model = patched(kind, attention)
    inputs = batch(model, prompts.MIXED)
    out = generate(model, inputs, TOKENS, return_dict_in_generate=True, output_logits=True)
    answer = new_ids(inputs, out.sequences)
    plain = tiny.tiny_model(kind)
    expected = masked_logits(plain, extended(inputs, answer), grown(kept_of(model), TOKENS))
    assert_close(torch.stack(out.logits, 1), expected[:, -TOKENS - 1 : -1])
    uncached = generate(model, inputs, TOKENS, use_cache=False)
    assert torch.equal(new_ids(inputs, uncached), answer)


def grown(kept: dict[int, torch.Tensor], by: int) -> dict[int, torch.Tensor]:
    """The choice with the generated tokens, which all stay."""
    return {n: torch.nn.functional.pad(mask, (0, by), value=True) for n, mask in kept.items()}


@pytest.mark.parametrize("method", METHODS)
@families
def test_cached_is_uncached_with_every_method(kind: str, method: str) -> None:
    model = patched(kind, **METHODS[method])
    inputs = batch(model, prompts.RAGGED)
    cached = generate(model, inputs, TOKENS)
    kept = kept_of(model)
    assert torch.equal(cached, generate(model, inputs, TOKENS, use_cache=False))
    assert torch.equal(cached, reference(kind, inputs, kept))


@pytest.mark.parametrize("kind", tiny.QWEN)
def test_videos_generate(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.VIDEO)
    cached = generate(model, inputs, TOKENS)
    assert torch.equal(cached, reference(kind, inputs, kept_of(model)))


@backends
@pytest.mark.parametrize("kind", [*tiny.FAMILIES, tiny.WINDOWED])
def test_assisted_decoding_is_greedy(kind: str, attention: str) -> None:
    """Prompt lookup feeds several tokens at once and crops the rejected ones from the cache."""
    if LOOKUP_NEEDS_AN_END:
        pytest.skip("prompt lookup of this transformers fails without a token that ends answers")
    model = patched(kind, attention)
    steps: list[int] = []
    prefills = 0
    for seed in range(3):
        inputs = batch(model, [prompt(*ECHO, seed=seed)])
        greedy = generate(model, inputs, 12)
        kept = kept_of(model)
        hook = tiny.decoder_layers(model)[7].register_forward_pre_hook(
            lambda _, args: steps.append(args[0].shape[1])
        )
        assisted = generate(model, inputs, 12, prompt_lookup_num_tokens=3)
        hook.remove()
        prefills += int(kept[6].sum())
        assert torch.equal(assisted, greedy)
        assert torch.equal(greedy, reference(kind, inputs, kept, max_new_tokens=12))
    assert len(steps) < 3 * 12, "no candidate was accepted: this shows nothing"
    assert sum(steps) - prefills > 3 * 12, "no candidate was rejected: crop was not seen"


@backends
@families
def test_a_static_cache_is_a_dynamic_one(kind: str, attention: str) -> None:
    model = patched(kind, attention)
    for case in (prompts.SINGLE, prompts.MIXED):
        inputs = batch(model, case)
        dynamic = generate(model, inputs, TOKENS)
        assert torch.equal(dynamic, reference(kind, inputs, kept_of(model)))
        assert torch.equal(dynamic, generate(model, inputs, TOKENS, cache_implementation="static"))


def test_a_static_sliding_cache_is_right_or_refused() -> None:
    model = patched(tiny.WINDOWED)
    inputs = batch(model, prompts.MIXED)
    dynamic = generate(model, inputs, TOKENS)
    try:
        static = generate(model, inputs, TOKENS, cache_implementation="static")
    except atp_patch.ATPError as refusal:
        assert "StaticSlidingWindowLayer" in str(refusal)  # noqa: PT017
    else:
        assert torch.equal(static, dynamic)


@families
def test_a_sample_may_end_before_the_others(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    free = new_ids(inputs, generate(model, inputs, TOKENS))
    end = free[0, 2].item()
    stopped = generate(model, inputs, TOKENS, eos_token_id=end)
    assert (new_ids(inputs, stopped)[0, 3:] == tiny.PAD).all()
    kept = kept_of(model)
    assert torch.equal(stopped, reference(kind, inputs, kept, eos_token_id=end))


@families
def test_contrastive_neighbours_do_not_share_a_choice(kind: str) -> None:
    """Two generations in turn: the second is as if the first had never been."""
    model = patched(kind)
    first, second = batch(model, prompts.MIXED), batch(model, prompts.RAGGED)
    generate(model, first, TOKENS)
    after = generate(model, second, TOKENS)
    assert torch.equal(after, generate(patched(kind), second, TOKENS))
    text = batch(model, prompts.NO_IMAGE)
    assert torch.equal(generate(model, text), generate(tiny.tiny_model(kind), text))


@backends
@pytest.mark.parametrize("kind", [*tiny.FAMILIES, tiny.WINDOWED])
@pytest.mark.parametrize("case", [prompts.SINGLE, prompts.MIXED], ids=["single", "mixed"])
def test_a_conversation_goes_on_with_its_cache(
    kind: str, attention: str, case: tuple[prompts.Prompt, ...]
) -> None:
    """Three turns of ``generate`` on one cache, each against masked generation from scratch."""
    model = patched(kind, attention)
    inputs = batch(model, case)
    out = generate(model, inputs, TOKENS, return_dict_in_generate=True)
    kept = kept_of(model)
    for turn in range(2):
        message = words(len(case), 4, seed=turn)
        said = torch.cat([new_ids(inputs, out.sequences), message], 1)
        history = extended(inputs, said)
        asked = {name: history[name] for name in ("input_ids", "attention_mask")}
        options = {"past_key_values": out.past_key_values, "return_dict_in_generate": True}
        out = generate(model, asked, TOKENS, **options)
        assert torch.equal(out.sequences, reference(kind, history, kept))


@families
def test_chunked_prefill_is_refused(kind: str) -> None:
    model = patched(kind)
    with pytest.raises(atp_patch.ATPError, match="prefill_chunk_size"):
        generate(model, batch(model, prompts.SINGLE), prefill_chunk_size=16)


@pytest.mark.parametrize("how", ["positional", "keyword", "the model's, behind another"])
def test_chunked_prefill_is_refused_however_it_is_said(how: str) -> None:
    model = patched("llava-llama")
    inputs = batch(model, prompts.SINGLE)
    ids, given = inputs.pop("input_ids"), GenerationConfig(max_new_tokens=2)
    (model.generation_config if how.startswith("the model's") else given).prefill_chunk_size = 16
    args = (ids, given) if how == "positional" else (ids,)
    named = {} if how == "positional" else {"generation_config": given}
    with pytest.raises(atp_patch.ATPError, match="prefill_chunk_size"):
        model.generate(*args, **named, **inputs)
    model.generation_config.prefill_chunk_size = 16
    out = model.generate(ids, **inputs, max_new_tokens=2, prefill_chunk_size=None)
    assert out.shape[1] == ids.shape[1] + 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a second device")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@families
def test_an_offloaded_cache_is_right_or_refused(kind: str, implementation: str) -> None:
    model = patched(kind).cuda()
    inputs = {name: value.cuda() for name, value in batch(model, prompts.MIXED).items()}
    expected = generate(model, inputs, TOKENS)
    try:
        actual = generate(model, inputs, TOKENS, cache_implementation=implementation)
    except atp_patch.ATPError:
        return
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("method", ["fastv", "learned", "voco"])
@families
def test_generating_without_a_cache_that_fills_is_refused_by_name(kind: str, method: str) -> None:
    """The plain model goes on from its last token alone and forgets the prompt."""
    options: dict[str, dict[str, Any]] = {
        "fastv": METHODS["fastv"],
        "learned": {
            "method": "atp",
            "layers": [2, 4],
            "thresholds": "learned",
            "reference_grid": 6,
        },
        "voco": {"method": "voco", "num_tokens": 2},
    }
    model = patched(kind, **options[method]).train()
    inputs = batch(model, prompts.RAGGED)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(atp_patch.CacheError, match=r"model\.eval\(\)"):
        generate(model, inputs)
    without_cache = generate(model, inputs, use_cache=False)
    model.gradient_checkpointing_disable()
    expected = generate(model, inputs)
    if method != "voco":  # without a cache its text would see the images' own tokens
        assert torch.equal(without_cache, expected)
    model.eval()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(generate(model, inputs), expected)
