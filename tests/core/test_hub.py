"""Adapters travel alone, come back whole, and are refused where they do not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import atp_patch
from atp_patch.methods import untrained_methods
from tests.helpers import inputs as made
from tests.helpers.run import INSIDE
from tests.helpers.tiny import tiny_model

LAYERS = [2, 4, 6]
FILES = {"atp_config.json", "README.md"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**made.batch(model, made.MIXED)).logits


@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
@pytest.mark.parametrize("method", untrained_methods())
def test_an_adapter_reproduces_the_patched_model(kind: str, method: str, tmp_path: Path) -> None:
    layers = LAYERS if method in INSIDE else None
    model = atp_patch.patch_model(tiny_model(kind), layers, method, keep=0.6)
    atp_patch.save_pretrained(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == FILES
    again = atp_patch.patch_model(tiny_model(kind), weights=tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "README.md"])
def test_a_folder_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    model = atp_patch.patch_model(tiny_model("llava-llama"), LAYERS, "fastv", keep=0.6)
    with pytest.raises(atp_patch.ConfigError, match=f"holds the {name} of something else"):
        atp_patch.save_pretrained(model, tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "precious"}


def test_an_adapters_own_folder_is_written_again(tmp_path: Path) -> None:
    for keep in (0.6, 0.3):
        model = atp_patch.patch_model(tiny_model("llava-llama"), LAYERS, "fastv", keep=keep)
        atp_patch.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "atp_config.json").read_text())["keep"] == [0.3] * 3


def learned(kind: str = "llava-llama") -> Any:
    torch.manual_seed(3)
    model = tiny_model(kind)
    atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6)
    for parameter in model.atp_patch_heads.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
def test_learned_thresholds_travel_as_safetensors(kind: str, tmp_path: Path) -> None:
    model = learned(kind)
    atp_patch.save_pretrained(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"atp_model.safetensors"}
    torch.manual_seed(4)
    again = atp_patch.patch_model(tiny_model(kind), weights=str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    theta = atp_patch.last_trace(again).layers[4].thresholds["redundant"]
    assert torch.all((theta > 0) & (theta < 1))


def test_a_checkpoint_of_the_patched_model_is_a_plain_one(tmp_path: Path) -> None:
    model = learned()
    plain = set(tiny_model("llava-llama").state_dict())
    assert set(model.state_dict()) > plain
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    atp_patch.unpatch_model(model)
    assert set(model.state_dict()) == set(again.state_dict()) == plain


@pytest.mark.parametrize("fault", ["empty", "foreign", "shape", "text", "missing"])
def test_broken_weights_are_refused(fault: str, tmp_path: Path) -> None:
    atp_patch.save_pretrained(learned(), tmp_path)
    file = tmp_path / "atp_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    if fault == "empty":
        save_file({}, file)
    elif fault == "foreign":
        save_file({"lm_head.weight": torch.zeros(2)}, file)
    elif fault == "shape":
        save_file({**tensors, name: torch.zeros(3)}, file)
    elif fault == "text":
        file.write_text("no tensors here")
    else:
        file.unlink()
    model = tiny_model("llava-llama")
    with pytest.raises(atp_patch.WeightsError, match=r"atp_model\.safetensors"):
        atp_patch.patch_model(model, weights=tmp_path)
    with pytest.raises(atp_patch.NotPatchedError):
        atp_patch.unpatch_model(model)


@pytest.mark.parametrize(
    ("key", "value"), [("family", "qwen2_vl"), ("num_layers", 32), ("hidden_size", 4096)]
)
def test_an_adapter_for_another_base_model_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    atp_patch.save_pretrained(learned(), tmp_path)
    file = tmp_path / "atp_config.json"
    data = json.loads(file.read_text())
    data["base"][key] = value
    file.write_text(json.dumps(data))
    with pytest.raises(atp_patch.WeightsError, match="was made for"):
        atp_patch.patch_model(tiny_model("llava-llama"), weights=tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(atp_patch.WeightsError, match=r"has no atp_config\.json"):
        atp_patch.patch_model(tiny_model("llava-llama"), weights=tmp_path)


def test_weights_come_with_nothing_beside_them(tmp_path: Path) -> None:
    atp_patch.save_pretrained(learned(), tmp_path)
    with pytest.raises(atp_patch.ConfigError, match="weights= alone"):
        atp_patch.patch_model(tiny_model("llava-llama"), weights=tmp_path, layers=[2])
