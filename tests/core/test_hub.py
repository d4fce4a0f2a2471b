"""Adapters travel alone, come back whole, and are refused where they do not belong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
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


def test_push_sends_the_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})()

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **kwargs: Any) -> str:
        sent[repo_id] = {file.name for file in Path(folder_path).iterdir()}
        return "address-of-the-commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert atp_patch.push_to_hub(learned(), "user/adapter") == "address-of-the-commit"
    assert sent == {"user/adapter": FILES | {"atp_model.safetensors"}}


class Unreachable(HfHubHTTPError.__bases__[0]):  # type: ignore[misc, name-defined]
    """What the Hub's client lets through where there is no network."""


@pytest.mark.parametrize(
    "cause",
    [
        HfHubHTTPError("403 Forbidden: no right to write\nRequest ID: 7", response=MagicMock()),
        RepositoryNotFoundError("404", response=MagicMock()),
        LocalTokenNotFoundError("Token is required, but no token found."),
        OfflineModeIsEnabled("offline mode is enabled"),
        Unreachable("name or service not known"),
        ConnectionResetError(104, "reset by peer"),
        RuntimeError("xet: the upload failed"),
    ],
    ids=lambda cause: type(cause).__name__,
)
@pytest.mark.parametrize("at", ["create_repo", "upload_folder"])
@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_a_refused_push_says_what_to_do(
    how: str, at: str, cause: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: HfApi, *args: Any, **kwargs: Any) -> None:
        raise cause

    repository = type("Repo", (), {"repo_id": "user/adapter"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda self, **kwargs: repository)
    monkeypatch.setattr(HfApi, at, refuse)
    push = partial(atp_patch.push_to_hub, repo_id="user/adapter")
    if how == "save_pretrained":
        push = partial(
            atp_patch.save_pretrained, folder=tmp_path, push_to_hub=True, repo_id="user/adapter"
        )
    with pytest.raises(atp_patch.HubError, match=r"user/adapter.*hf auth login") as refusal:
        push(learned())
    assert isinstance(refusal.value, atp_patch.ATPError)
    assert refusal.value.__cause__ is cause
    assert str(cause).splitlines()[0] in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["two/slashes/here", "a" * 300, "\ud800", ""])
def test_a_push_to_no_name_says_what_to_do(name: str) -> None:
    with pytest.raises(atp_patch.HubError, match="Give a name like USER/REPOSITORY"):
        atp_patch.push_to_hub(learned(), name)


def test_a_hub_id_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    atp_patch.save_pretrained(learned(), tmp_path)
    asked = []

    def download(repo_id: str, name: str) -> str:
        asked.append((repo_id, name))
        return str(tmp_path / name)

    monkeypatch.setattr("atp_patch.patching.adapter_files.hf_hub_download", download)
    atp_patch.patch_model(tiny_model("llava-llama"), weights="user/adapter")
    assert asked == [("user/adapter", "atp_config.json"), ("user/adapter", "atp_model.safetensors")]
