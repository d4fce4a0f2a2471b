"""Models spread by accelerate: its hooks move weights and hidden states around the patch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules

import atp_patch
from atp_patch.tools.visual_cache import fingerprint
from tests.core.test_calibration import batches
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


def test_thresholds_of_an_offloaded_model_are_calibrated() -> None:
    model = tiny_model("llava-llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6)
    found = atp_patch.calibrate(model, batches(model), 24)
    assert found.after == pytest.approx(24, rel=0.01)


def test_images_are_compressed_by_an_offloaded_model() -> None:
    kept = atp_patch.patch_model(tiny_model("llava-llama"), method="voco", num_tokens=2)
    tokens = kept.atp_patch_heads.state_dict()
    model = tiny_model("llava-llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    atp_patch.patch_model(model, method="voco", num_tokens=2)
    model.atp_patch_heads.load_state_dict(tokens)
    inputs = made.batch(model, made.SINGLE)
    cache = atp_patch.compress(model, inputs)
    expected = atp_patch.compress(kept, inputs)
    assert cache.model == expected.model  # so that the one may be read with the other
    layers = kept.get_decoder().layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    tied = tiny_model("llava-llama")
    layers = tied.get_decoder().layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    cpu_offload(tied, execution_device=torch.device("cpu"))
    atp_patch.patch_model(tied, method="voco", num_tokens=2)
    tied.atp_patch_heads.load_state_dict(tokens)
    assert fingerprint(tied) == fingerprint(kept)
    assert torch.equal(cache.held.keys[0], expected.held.keys[0])


@pytest.mark.parametrize("method", ["atp", "voco"])
def test_what_learns_and_was_offloaded_too_is_refused(method: str) -> None:
    model = tiny_model("llava-llama")
    learned = {"layers": LAYERS, "thresholds": "learned", "reference_grid": 6}
    atp_patch.patch_model(model, method=method, **(learned if method == "atp" else {}))
    cpu_offload(model, execution_device=torch.device("cpu"))
    inputs = made.batch(model, made.SINGLE)
    use = {"atp": lambda: atp_patch.calibrate(model, [inputs], 16)}
    use["voco"] = lambda: atp_patch.compress(model, inputs)
    with pytest.raises(atp_patch.ConfigError, match="offload it first, then patch it"):
        use[method]()


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
