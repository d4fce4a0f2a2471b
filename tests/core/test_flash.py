"""The flash path with its calling convention (2D masks or none, packed-sequence detection),
emulated.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import atp_patch
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model

NAME = "flash_attention_2"


def emulated_flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What flash attention computes from a 2D mask, with torch's own attention."""
    assert module.config._attn_implementation == NAME
    if position_ids is not None and attention_mask is None and query.shape[2] > 1:
        assert bool((position_ids.diff() == 1).all()), "gaps would be read as packed sequences"
    rows, keys = query.shape[2], key.shape[2]
    place = torch.arange(rows)[:, None] + keys - rows
    seen = (torch.arange(keys) <= place)[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], keys)
        seen = seen & attention_mask[:, None, None, :].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, emulated_flash)


def switched(model: Any) -> Any:
    model.model.language_model.config._attn_implementation_internal = NAME
    return model


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("prompts", [made.SAME_SIZE, made.MIXED], ids=["same", "ragged"])
@pytest.mark.parametrize("method", ["atp", "fastv"])
def test_flash_gives_what_sdpa_gives(kind: str, padding: str, prompts: Any, method: str) -> None:
    model = tiny_model(kind)
    atp_patch.patch_model(model, [2, 4, 6], method, keep=0.5)
    inputs = made.batch(model, prompts, padding)
    real = made.real_mask(inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        kept = atp_patch.last_trace(model).layers[6].kept
        got = switched(model)(**inputs).logits
    assert torch.equal(atp_patch.last_trace(model).layers[6].kept, kept)
    torch.testing.assert_close(got[kept & real], expected[kept & real], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
@pytest.mark.parametrize("prompts", [made.SAME_SIZE, made.MIXED], ids=["same", "ragged"])
def test_flash_generates_what_sdpa_generates(kind: str, prompts: Any) -> None:
    model = tiny_model(kind)
    atp_patch.patch_model(model, [2, 4, 6], keep=0.5)
    inputs = made.batch(model, prompts, "left")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    got = switched(model).generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("flash")
def test_flash_beyond_a_sliding_window_is_refused_by_name() -> None:
    model = switched(tiny_model("llava-mistral-window"))
    atp_patch.patch_model(model, [2, 4, 6], keep=0.5)
    with pytest.raises(atp_patch.CacheError, match="set_attn_implementation"):
        model(**made.batch(model, made.SINGLE))
