"""FLOPs that a trace counts, against torch's own counter."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atp_patch
from atp_patch.seam import decoder_shape
from tests.families import mrope
from tests.families.kinds import SINGLE, Kind, make

NAMES = ("glm4v", "glm4v_moe", "qwen3_vl-flat", "qwen3_vl_moe")
CHOSEN = [kind for kind in mrope.KINDS if kind.name in NAMES]


def test_none_is_left_out() -> None:
    assert {kind.name for kind in CHOSEN} == set(NAMES)


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ({}, [10] * 6),
        ({"num_experts_per_tok": 2}, [20] * 6),  # gpt-oss, Mixtral
        ({"num_experts_per_tok": 2, "moe_intermediate_size": 3}, [6] * 6),
        (
            {
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 3,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [1],
                "shared_expert_intermediate_size": 7,
            },
            [10, 10, 10, 13, 10, 13],
        ),
        (
            {
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 3,
                "n_shared_experts": 1,
                "first_k_dense_replace": 2,
            },
            [10, 10, 9, 9, 9, 9],
        ),
        (  # ERNIE-4.5-VL: the text's experts and the picture's
            {"moe_k": 2, "moe_intermediate_size": [3, 1], "moe_num_shared_experts": 2},
            [12] * 6,
        ),
        ({"intermediate_size": [10] * 6}, [10] * 6),
        (  # Step 3.7: each layer says what it is
            {
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 3,
                "share_expert_dim": 5,
                "mlp_layer_types": ["dense", "sparse", "sparse"] * 2,
            },
            [10, 11, 11] * 2,
        ),
        (  # LFM2 takes two thirds of what its config says, in whole steps
            {
                "intermediate_size": 34,
                "block_auto_adjust_ff_dim": True,
                "block_ffn_dim_multiplier": 1.0,
                "block_multiple_of": 8,
            },
            [24] * 6,
        ),
    ],
)
def test_sizes_of_mixtures_are_as_their_configurations_say(
    said: dict[str, object], sizes: list[int]
) -> None:
    common = {"num_hidden_layers": 6, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    config = SimpleNamespace(**common, **({"intermediate_size": 10} | said))
    assert list(decoder_shape(config).mlp_sizes) == sizes


@pytest.mark.parametrize("kind", CHOSEN, ids=lambda kind: kind.name)
def test_flops_are_those_of_the_experts_that_a_token_visits(kind: Kind) -> None:
    model, inputs = kind.build(), make(kind, SINGLE).inputs
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    atp_patch.patch_model(model, [3, 5], "uniform", keep=1.0)
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        model(**inputs, logits_to_keep=1)
    text = model.config.text_config
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    parts = re.compile(r".*(language_model\.layers\.\d+|lm_head)")  # not the rotary angles
    counted = sum(n for name, n in counts.items() if parts.fullmatch(name))
    experts = getattr(text, "n_routed_experts", None) or getattr(text, "num_experts", 0)
    mixtures = text.num_hidden_layers - getattr(text, "first_k_dense_replace", 0)
    tokens = inputs["input_ids"].shape[1]
    choosing = 2 * tokens * text.hidden_size * experts * (mixtures if experts else 0)
    assert atp_patch.last_trace(model).flops_plain == counted - choosing
