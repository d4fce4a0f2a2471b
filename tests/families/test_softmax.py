"""Scores where the host's softmax is its own: capped logits (Gemma 2) and sinks (gpt-oss)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig

import atp_patch
from tests.families import square, towers
from tests.families.kinds import TEXT, Kind, Picture, Words, make, sample
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.run import forward

KINDS = {kind.name: kind for kind in (*square.KINDS, *towers.KINDS)}
LAYER = 3


def _capped() -> Any:
    config = KINDS["paligemma2"].config()
    config.get_text_config().attn_logit_softcapping = 0.5
    return config


def _sunk() -> Any:
    config = KINDS["llava"].config()
    config.text_config = GptOssConfig(
        **TEXT, num_local_experts=2, num_experts_per_tok=1, sliding_window=tiny.WINDOW
    )
    return config


def _loud_sinks(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.copy_(torch.linspace(-1, 4, parameter.numel()))


CAPPED = replace(KINDS["paligemma2"], name="capped", config=_capped)
SUNK = replace(KINDS["llava"], name="sunk", config=_sunk, attention="eager", adjust=_loud_sinks)


@pytest.mark.parametrize("kind", [CAPPED, SUNK], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("method", "score"), [("fastv", "last"), ("atp", "cross"), ("sparsevlm", "raters")]
)
def test_scores_are_the_attention_of_the_layer_before(kind: Kind, method: str, score: str) -> None:
    plain = kind.build()
    inputs = make(kind, [sample(Picture(0), Words(1), seed=1)]).inputs  # one row of text asks
    visual = (inputs["input_ids"] == plain.config.image_token_id)[0]
    maps = forward(plain, inputs, output_attentions=True).attentions
    paid = maps[LAYER - 1][0, :, -1].mean(0)
    options: dict[str, Any] = {"atp": {"cross_over": "all"}, "sparsevlm": {"recycle_share": 0.0}}
    model = atp_patch.patch_model(
        plain, method=method, layers=[LAYER], keep=0.5, **options.get(method, {})
    )
    forward(model, inputs)
    (layer,) = atp_patch.last_trace(model).layers.values()
    assert_close(layer.scores[score][0, visual], paid[visual])
