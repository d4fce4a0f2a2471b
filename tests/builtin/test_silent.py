"""Leaving silent layers out changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import atp_patch
from atp_patch.builtin.silent import silent_layers, without
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.inputs import batch, extended
from tests.helpers.run import forward, words

SILENT = (1, 3, 4, 6, 7)
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "atp": {"layers": [2, 4, 6], "keep": 0.5},
    "fastv": {"method": "fastv", "layers": [2], "keep": 0.3},
    "prumerge+": {"method": "prumerge+"},
    "sparsevlm": {"method": "sparsevlm", "layers": [2, 4], "keep": 0.5},
}


def silenced(kind: str) -> Any:
    model = tiny.tiny_model(kind)
    for number in SILENT:
        layer = tiny.decoder_layers(model)[number]
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def passes(model: Any, kind: str) -> list[torch.Tensor]:
    """Logits of a prompt, and of words behind it on its cache."""
    inputs = batch(model, prompts.RAGGED)
    read = forward(model, inputs, use_cache=True)
    more = words(2, 3)
    mask = extended(inputs, more)["attention_mask"]
    told = forward(model, {"input_ids": more, "attention_mask": mask}, past_key_values=read[1])
    return [read.logits, told.logits]


@pytest.mark.parametrize("way", list(WAYS))
def test_not_a_bit_changes(way: str) -> None:
    model = silenced("llava-llama")
    settings = WAYS[way]
    places: list[int] = []
    if settings is not None:
        atp_patch.patch_model(model, **settings)
        places = settings.get("layers", [])
    found = silent_layers(model)
    assert found == SILENT
    expected = passes(model, "llava-llama")
    with without(model, found, [layer - 1 for layer in places]):
        left_out = [n for n, x in enumerate(tiny.decoder_layers(model)) if "forward" in vars(x)]
        actual = passes(model, "llava-llama")
    assert set(left_out) == set(SILENT) - {layer - 1 for layer in places}
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not any("forward" in vars(x) for x in tiny.decoder_layers(model))


def test_a_layer_that_adds_something_is_not_silent() -> None:
    model = silenced("llava-llama")
    layers = tiny.decoder_layers(model)
    nn.init.ones_(layers[3].mlp.down_proj.weight)
    nn.init.ones_(layers[6].self_attn.o_proj.weight)
    assert silent_layers(model) == (1, 4, 7)
    assert silent_layers(tiny.tiny_model("qwen2_vl")) == ()
