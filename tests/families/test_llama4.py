"""What Llama 4 alone has: queries whose scale hangs on their position, and chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.seam import decoder_shape
from tests.families.kinds import MIXED, SINGLE, TWO, Kind, make
from tests.families.llama4 import KINDS, config
from tests.families.test_every_family import check_masked, patched
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import extended
from tests.helpers.run import forward, generate

pytestmark = pytest.mark.skipif(
    not KINDS, reason="this version of transformers has no Llama 4 that runs"
)


@pytest.fixture
def tuned() -> Kind:
    """The scale of a query grows every eighth position."""
    made = partial(config, floor_scale=8, attn_scale=1.0)
    return replace(KINDS[0], name="llama4-tuned", config=made)


def test_survivors_keep_the_scale_of_their_own_position(tuned: Kind) -> None:
    model = patched(tuned)
    check_masked(tuned, model, tuned.build(), make(tuned, TWO))
    check_masked(tuned, model, tuned.build(), make(tuned, MIXED, "right"))
    inputs = make(tuned, TWO).inputs
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (
        torch.stack(generate(model, inputs, 2, use_cache=use, **wanted).logits)
        for use in (True, False)
    )
    assert_close(cached, uncached)


def test_an_image_in_a_later_turn_keeps_the_scale_of_its_position(tuned: Kind) -> None:
    """The second turn's tokens stand behind all of the first turn's, which has no image."""
    wide = replace(tuned, config=partial(config, floor_scale=8, attention_chunk_size=4096))
    model, inputs = patched(wide, method="uniform"), make(wide, SINGLE).inputs
    before = torch.arange(tiny.FIRST_WORD, tiny.FIRST_WORD + 11)[None]
    words = {"input_ids": before, "attention_mask": torch.ones_like(before)}
    together = {
        **inputs,
        "input_ids": torch.cat([before, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([words["attention_mask"], inputs["attention_mask"]], 1),
    }
    expected = forward(model, together).logits[:, -5:]
    cache = forward(model, words, use_cache=True).past_key_values
    turn = {**inputs, "attention_mask": together["attention_mask"]}
    assert_close(forward(model, turn, past_key_values=cache).logits[:, -5:], expected)


def test_a_conversation_goes_on_past_the_chunk() -> None:
    kind = replace(KINDS[0], name="llama4-chunks", config=partial(config, attention_chunk_size=8))
    model, inputs = patched(kind, method="uniform"), make(kind, SINGLE).inputs
    more = torch.arange(tiny.FIRST_WORD, tiny.FIRST_WORD + 9)[None]
    longer = extended(inputs, more)
    expected = forward(model, longer).logits[:, -1:]
    out = forward(model, inputs, use_cache=True)
    for number in range(more.shape[1]):
        length = inputs["input_ids"].shape[1] + number + 1
        step: dict[str, Any] = {
            "input_ids": more[:, number : number + 1],
            "attention_mask": longer["attention_mask"][:, :length],
        }
        out = forward(model, step, past_key_values=out.past_key_values, use_cache=True)
    assert_close(out.logits, expected)


def test_costs_are_those_of_the_expert_that_a_token_visits_and_the_shared_one() -> None:
    text = KINDS[0].build().config.text_config
    assert decoder_shape(text).mlp_sizes == (96, 192) * 4


def test_rotation_by_row_and_column_is_refused() -> None:
    kind = KINDS[0]
    model = patched(kind, rope_2d="force")
    with pytest.raises(atp_patch.UnsupportedModelError, match="not of a known kind"):
        forward(model, make(kind, SINGLE).inputs)
