"""``min_tokens=0``: no visual token at all goes on."""

from __future__ import annotations

import pytest
import torch

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import batch, visual_mask
from tests.helpers.oracle import masked_generate, masked_logits
from tests.helpers.run import INSIDE, forward, generate, kept_of, new_ids, patched

NOTHING = {"layers": [3], "keep": 1e-9, "min_tokens": 0}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_text_alone_goes_on(kind: str, attention: str, padding: str) -> None:
    plain = tiny.tiny_model(kind, attention)
    model = patched(kind, attention, method="uniform", **NOTHING)
    inputs = batch(plain, prompts.MIXED, padding)
    logits = forward(model, inputs).logits
    kept = kept_of(model)
    assert not (kept[3] & visual_mask(inputs)).any()
    assert_close(logits, masked_logits(plain, inputs, kept), kept[3])
    trace = atp_patch.last_trace(model)
    assert trace.tokens_per_layer[:, 3:].sum() == 0


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_generation_goes_on_without_the_image(kind: str) -> None:
    plain = tiny.tiny_model(kind)
    model = patched(kind, method="uniform", **NOTHING)
    inputs = batch(plain, prompts.RAGGED)
    ids = new_ids(inputs, generate(model, inputs))
    wanted = masked_generate(plain, inputs, kept_of(model), max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, new_ids(inputs, wanted))


@pytest.mark.parametrize("method", INSIDE)
def test_every_method_can_keep_nothing(method: str) -> None:
    model = patched("llava-llama", method=method, **NOTHING)
    inputs = batch(model, prompts.SAME_SIZE)
    forward(model, inputs)
    assert not (kept_of(model)[3] & visual_mask(inputs)).any()
