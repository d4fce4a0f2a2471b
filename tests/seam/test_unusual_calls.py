"""Calls that are rare but right: new ids alone, replicas, Ctrl-C, one's own generate."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import atp_patch
from atp_patch.seam import CACHE_ARGUMENT
from atp_patch.seam.decoder.host_pass import HostPass
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Image, Inputs, Words, batch, prompt
from tests.helpers.run import Session, forward, generate, kept_of, patched, positioned
from tests.helpers.voco import voco_model

families = pytest.mark.parametrize("kind", tiny.FAMILIES)
TURN = prompt(Words(2), Image(), Words(5), seed=90)


def later_turn(model: Any, first: Any = prompts.SINGLE) -> tuple[Session, Inputs, Inputs]:
    """A conversation, a turn with an image, and that turn as ``generate`` takes it: its ids
    alone, under a mask of the whole.
    """
    session, turn = Session(model, batch(model, first)), batch(model, [TURN])
    mask = torch.cat([session.inputs["attention_mask"], turn["attention_mask"]], 1)
    return session, turn, {**turn, "attention_mask": mask}


@pytest.mark.parametrize("first", [prompts.SINGLE, prompts.NO_IMAGE[:1]], ids=["image", "text"])
def test_generate_from_the_ids_of_a_later_turn_alone(first: Any) -> None:
    model = patched("llava-llama")
    session, turn, asked = later_turn(model, first)
    twin, length = session.fork(), turn["input_ids"].shape[1]
    generate(model, asked, 2, past_key_values=session.cache)
    assert atp_patch.last_trace(model).layout.length == length
    found = kept_of(model)
    forward(model, asked, past_key_values=twin.cache, use_cache=True)
    for layer, kept in kept_of(model).items():
        assert torch.equal(kept, found[layer])
        assert kept.sum() < length


def test_tokens_dropped_before_the_decoder_leave_no_tombstone_in_a_later_turn() -> None:
    model = atp_patch.patch_model(tiny.tiny_model("llava-llama"), method="prumerge", keep=0.25)
    session, _, asked = later_turn(model)
    out = model.generate(
        **asked,
        **{CACHE_ARGUMENT: session.cache},
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert all(bool(torch.isfinite(logits).all()) for logits in out.logits)


def test_replicas_of_data_parallel_are_refused() -> None:
    model: Any = patched("llava-llama")
    model._is_replica = True  # as torch marks them
    with pytest.raises(atp_patch.UnsupportedModelError, match="torchrun"):
        forward(model, batch(model, prompts.SINGLE))


@families
def test_a_broken_off_pass_is_forgotten(kind: str) -> None:
    """Ctrl-C runs no hook behind it; the next call may be one of the model without its head."""
    model, fresh = patched(kind), patched(kind)
    inputs, others = batch(model, prompts.SINGLE), batch(model, prompts.MIXED)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[5].register_forward_pre_hook(stop)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with pytest.raises(KeyboardInterrupt):
        forward(model, {**inputs, "labels": labels})
    handle.remove()
    with torch.no_grad():
        got = model.model(**others).last_hidden_state
        assert torch.equal(got, fresh.model(**others).last_hidden_state)


def test_a_generate_of_ones_own_is_called_and_kept() -> None:
    model: Any = tiny.tiny_model("llava-llama")
    own = partial(model.generate, max_new_tokens=2)
    model.generate = own
    atp_patch.patch_model(model, method="fastv", layers=[2], keep=0.5)
    inputs = batch(model, prompts.SINGLE)
    assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 2
    assert atp_patch.last_trace(model).layers
    atp_patch.unpatch_model(model)
    assert model.generate is own


def test_one_that_came_later_is_left_alone() -> None:
    model: Any = patched("llava-llama")
    later = partial(model.generate, max_new_tokens=2)
    model.generate = later
    atp_patch.unpatch_model(model)
    assert model.generate is later


@families
def test_chunks_are_read_while_disabled(kind: str) -> None:
    model = patched(kind)
    text = batch(model, prompts.NO_IMAGE[:1])
    with pytest.raises(atp_patch.UnsupportedModelError, match="disabled"):
        generate(model, text, 2, prefill_chunk_size=4)
    plain = generate(tiny.tiny_model(kind), text, 2, prefill_chunk_size=4)
    with atp_patch.disabled(model):
        assert torch.equal(generate(model, text, 2, prefill_chunk_size=4), plain)


def test_compressing_leaves_every_module_in_its_mode() -> None:
    model = voco_model("llava-llama").train()
    model.model.vision_tower.eval()
    before = [module.training for module in model.modules()]
    atp_patch.compress(model, batch(model, prompts.SINGLE))
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("make", [partial(patched, method="atp", thresholds="learned"), voco_model])
def test_a_copy_that_nothing_uses_does_not_learn(make: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    options = {} if make is voco_model else {"layers": [2]}
    model = make("llava-llama", **options)
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["atp_patch_heads"])
    model.add_adapter(lora)
    with pytest.raises(atp_patch.ConfigError, match=r"requires_grad_\(True\)"):
        forward(model, batch(model, prompts.SINGLE))
    with pytest.raises(atp_patch.ConfigError, match="modules_to_save"):
        atp_patch.save_pretrained(model, tmp_path)


# -- sliding windows, to the token ----------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, 1])
def test_a_later_image_in_a_window_that_is_just_full(spare: int) -> None:
    """A cache of a full window has let its oldest key go."""
    plain, model = (tiny.tiny_model(tiny.WINDOWED) for _ in range(2))
    total = sum(batch(plain, [one])["input_ids"].shape[1] for one in (*prompts.SINGLE, TURN))
    for one in (plain, model):
        one.config.get_text_config().sliding_window = total + spare
    atp_patch.patch_model(model, method="fastv", layers=[2], keep=0.5)
    cache = DynamicCache(config=model.config.get_text_config())
    session, turn = Session(model, batch(model, prompts.SINGLE), cache), batch(model, [TURN])
    whole = {
        name: torch.cat([session.inputs[name], turn[name]], 1)
        for name in ("input_ids", "attention_mask")
    }
    start = session.inputs["input_ids"].shape[1]
    asked = {**turn, "attention_mask": whole["attention_mask"]}
    asked["position_ids"] = positioned(model, whole)["position_ids"][:, start:]
    if not spare:
        with pytest.raises(atp_patch.CacheError, match=f"fills the sliding window of {total}"):
            forward(model, asked, past_key_values=session.cache, use_cache=True)
        return
    forward(model, asked, past_key_values=session.cache, use_cache=True)
    layer = atp_patch.last_trace(model).layers[2]
    pixels = torch.cat([session.inputs["pixel_values"], turn["pixel_values"]])
    full = {**positioned(model, whole), "pixel_values": pixels}
    plain.set_attn_implementation("eager")
    first = atp_patch.patch_model(plain, method="fastv", layers=[2], keep=0.5)
    scores = _last_row(first, full)[start:]
    scored = ~layer.scores["last"][0].isnan()
    assert scored.any()
    # The first image's tokens are all there for the layer before.
    assert_close(layer.scores["last"][0][scored], scores[scored])


def _last_row(model: Any, inputs: Inputs) -> torch.Tensor:
    """(L,) mean attention of the last token in layer 1 of the plain model."""
    with atp_patch.disabled(model):
        return forward(model, inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)


def test_every_layer_of_a_flash_decoder_checks_its_own_window() -> None:
    """A mask that layers share says nothing of the window of the second."""
    host = HostPass(
        cache=None,
        past=0,
        total=10,
        implementation="flash_attention_2",
        plain_mask=True,
        sliding_window=lambda layer: 4 if layer else None,
        key_layers=(0, 1),
        attending=(0, 1),
    )
    survivors: Any = SimpleNamespace(once=lambda key, of, make: None)
    host.narrow_kwargs(0, survivors, {})
    with pytest.raises(atp_patch.CacheError, match="sliding window of 4"):
        host.narrow_kwargs(1, survivors, {})
