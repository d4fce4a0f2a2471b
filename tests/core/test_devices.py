"""Models spread by accelerate: its hooks move weights and hidden states around the patch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules

import atp_patch
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model

LAYERS = [2, 4, 6]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**made.batch(model, made.MIXED)).logits


@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
@pytest.mark.parametrize("patched_first", [True, False])
def test_offloaded_weights(kind: str, patched_first: bool, tmp_path: Path) -> None:
    expected = logits(atp_patch.patch_model(tiny_model(kind), LAYERS, keep=0.5))
    model = tiny_model(kind)
    if patched_first:
        atp_patch.patch_model(model, LAYERS, keep=0.5)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    if not patched_first:
        atp_patch.patch_model(model, LAYERS, keep=0.5)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    atp_patch.unpatch_model(model)
    remove_hook_from_submodules(model)


def test_learned_heads_follow_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model("llava-llama")
    atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6)
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_a_half_precision_model_keeps_what_it_should() -> None:
    model = atp_patch.patch_model(tiny_model("llava-llama"), LAYERS, keep=0.5)
    logits(model)
    exact = atp_patch.last_trace(model).layers[2].kept
    model.to(torch.bfloat16)
    inputs = made.batch(model, made.MIXED)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        assert model(**inputs).logits.dtype == torch.bfloat16
    kept = atp_patch.last_trace(model).layers[2].kept
    assert torch.equal(kept.sum(1), exact.sum(1))
    assert float((kept == exact).float().mean()) > 0.9
