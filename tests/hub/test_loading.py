"""Adapters are loaded from the Hub as models are; what goes wrong is told apart, in one line."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import atp_patch
from atp_patch.patching.api import require_patch
from tests.helpers import inputs as made
from tests.helpers.hub import Files, LoopbackHub
from tests.helpers.tiny import tiny_model
from tests.hub.conftest import OTHER, READER, TOKEN

KIND, LAYERS = "llava-llama", [2, 4, 6]
CONFIG, WEIGHTS = "atp_config.json", "atp_model.safetensors"
NAME = "ann/adapter"


def files_of(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Learned thresholds, which are saved with weights."""
    torch.manual_seed(3)
    model: Any = tiny_model(KIND)
    atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6)
    for parameter in model.atp_patch_heads.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    folder = tmp_path_factory.mktemp("adapter")
    atp_patch.save_pretrained(model, folder)
    return files_of(folder)


@pytest.fixture(scope="module")
def expected(adapter: Files, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The logits of the model with the adapter from a folder."""
    folder = tmp_path_factory.mktemp("folder")
    for name, data in adapter.items():
        (folder / name).write_bytes(data)
    return logits(atp_patch.patch_model(tiny_model(KIND), weights=folder))


def keeping(share: float) -> Files:
    """An adapter without learned weights, told apart by its budget."""
    model: Any = atp_patch.patch_model(tiny_model(KIND), LAYERS, "fastv", keep=share)
    return {CONFIG: require_patch(model).config.to_json().encode()}


def kept(**arguments: Any) -> float:
    """The budget of the adapter that is loaded."""
    keep = require_patch(atp_patch.patch_model(tiny_model(KIND), **arguments)).config.keep
    assert keep is not None
    return keep[0]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**made.batch(model, made.MIXED)).logits


def refusal(error: type[Exception] = atp_patch.HubError, **arguments: Any) -> str:
    """The one line in which loading is refused; the model stays as it was."""
    model: Any = tiny_model(KIND)
    with pytest.raises(error) as refused:
        atp_patch.patch_model(model, **{"weights": NAME, **arguments})
    assert isinstance(refused.value, atp_patch.ATPError)
    with pytest.raises(atp_patch.NotPatchedError):
        atp_patch.last_trace(model)
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 400
    assert arguments.get("token") not in said.split() if arguments.get("token") else True
    return said


@pytest.mark.parametrize("large", [None, 0], ids=["in git", "in LFS"])
def test_a_public_adapter_is_loaded(
    large: int | None, hub: LoopbackHub, adapter: Files, expected: torch.Tensor
) -> None:
    hub.large = large
    hub.add(NAME, adapter)
    model = atp_patch.patch_model(tiny_model(KIND), weights=NAME)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_files_that_are_no_adapters_are_left_where_they_are(
    hub: LoopbackHub, adapter: Files, tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    trap = pickle.dumps(Trap())
    hub.add(NAME, {**adapter, "pytorch_model.bin": trap, "atp_model.bin": trap, "a.py": b"1/0"})
    atp_patch.patch_model(tiny_model(KIND), weights=NAME)
    assert not (tmp_path / "sprung").exists()
    asked = [request for request in hub.requests if "/resolve/" in request]
    assert {request.rpartition("/")[2] for request in asked} == {CONFIG, WEIGHTS}


def test_a_pickle_in_the_place_of_the_weights_is_refused(
    hub: LoopbackHub, adapter: Files, tmp_path: Path
) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "pickle")
    hub.add(NAME, {**adapter, WEIGHTS: (tmp_path / "pickle").read_bytes()})
    assert "is not a safetensors file" in refusal(atp_patch.WeightsError)


def test_a_private_adapter_needs_its_owners_token(hub: LoopbackHub, adapter: Files) -> None:
    hub.add(NAME, adapter, private=True)
    atp_patch.patch_model(tiny_model(KIND), weights=NAME, token=READER)
    assert "if it is private, log in with `hf auth login`" in refusal(cache_dir="/nowhere-yet")
    assert "that this token may see" in refusal(token=OTHER, cache_dir="/nowhere-yet")


def test_the_stored_token_is_used(
    hub: LoopbackHub, adapter: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, adapter, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "if it is private" in refusal(token=False)
    atp_patch.patch_model(tiny_model(KIND), weights=NAME)


def test_a_wrong_token_is_named(hub: LoopbackHub, adapter: Files) -> None:
    hub.add(NAME, adapter)
    said = refusal(token="hf_nobodys")
    assert "does not know this token" in said
    assert f"{hub.url}/settings/tokens" in said
    assert "none is stored" in refusal(token=True)


def test_no_such_repository(hub: LoopbackHub) -> None:
    assert "knows no repository 'ann/adapter'" in refusal()
    assert "there is no repository 'ann/adapter'" in refusal(token=TOKEN)


def test_a_gated_repository(hub: LoopbackHub, adapter: Files) -> None:
    hub.add(NAME, adapter, gated=True)
    assert f"ask for access at {hub.url}/ann/adapter" in refusal()
    assert "is gated" in refusal(token=OTHER)
    atp_patch.patch_model(tiny_model(KIND), weights=NAME, token=TOKEN)


def test_branches_and_commits(hub: LoopbackHub) -> None:
    first = hub.add(NAME, keeping(0.3))
    hub.add(NAME, keeping(0.6))
    hub.add(NAME, keeping(0.8), branch="trial")
    assert kept(weights=NAME) == 0.6
    assert kept(weights=NAME, revision="trial") == 0.8
    assert kept(weights=NAME, revision=first) == 0.3
    assert "has no revision 'lost'" in refusal(revision="lost")
    assert "has no revision" in refusal(revision="0" * 40)


def test_a_pinned_commit_is_read_without_asking_again(hub: LoopbackHub) -> None:
    commit = hub.add(NAME, keeping(0.3))
    kept(weights=NAME, revision=commit)
    hub.requests.clear()
    assert kept(weights=NAME, revision=commit) == 0.3
    assert hub.requests == []


def test_both_files_are_of_one_commit(
    hub: LoopbackHub, adapter: Files, expected: torch.Tensor
) -> None:
    """Another adapter is pushed between the first request and the others."""
    hub.add(NAME, adapter)
    hub.before["GET /api/models/ann/adapter/tree"] = lambda: hub.add(NAME, keeping(0.3))
    model = atp_patch.patch_model(tiny_model(KIND), weights=NAME)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert kept(weights=NAME) == 0.3


def test_a_folder_of_the_repository(hub: LoopbackHub) -> None:
    hub.add(NAME, {f"kept/{CONFIG}": keeping(0.4)[CONFIG]})
    assert kept(weights=NAME, subfolder="kept") == 0.4
    assert f"has no {CONFIG}" in refusal(atp_patch.WeightsError)
    assert "ann/adapter/lost is no adapter" in refusal(atp_patch.WeightsError, subfolder="lost")
    assert "leads out" in refusal(atp_patch.ConfigError, subfolder="../kept")


def test_what_is_no_adapter(hub: LoopbackHub) -> None:
    hub.add(NAME, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"lora"})
    assert "is no adapter" in refusal(atp_patch.WeightsError)
    hub.add(NAME, {CONFIG: b"{}"})
    assert "version" in refusal(atp_patch.WeightsError)


def test_an_adapter_of_another_shape(hub: LoopbackHub) -> None:
    data = json.loads(keeping(0.4)[CONFIG])
    data["base"]["num_layers"] = 32
    hub.add(NAME, {CONFIG: json.dumps(data).encode()})
    assert "ann/adapter was made for a llava model of 32 layers" in refusal(atp_patch.WeightsError)


def test_offline_the_cache_is_used(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add(NAME, keeping(0.3))
    said = refusal(local_files_only=True)
    assert "not whole in the cache" in said
    assert "local_files_only=True" in said
    kept(weights=NAME, cache_dir=tmp_path / "elsewhere")
    assert kept(weights=NAME, cache_dir=tmp_path / "elsewhere", local_files_only=True) == 0.3
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal()
    assert kept(weights=NAME, cache_dir=tmp_path / "elsewhere") == 0.3
    assert hub.requests == []


def test_without_a_network(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, keeping(0.3))
    kept(weights=NAME)
    with socket.socket() as held:  # a port at which nobody listens
        held.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
        assert kept(weights=NAME) == 0.3
        said = refusal(weights="ann/other")
    assert "cannot be reached" in said
    assert "check the network" in said


def test_an_error_of_the_hub(hub: LoopbackHub) -> None:
    hub.add(NAME, keeping(0.3))
    hub.cut("GET /api/models", times=9, status=503)
    assert "error of its own (503); try again later" in refusal()


@pytest.mark.parametrize("after", [0, 30])
def test_a_download_that_breaks_goes_on(
    after: int, hub: LoopbackHub, adapter: Files, expected: torch.Tensor
) -> None:
    hub.add(NAME, adapter)
    fault = hub.cut(f"GET .*{WEIGHTS}", after=after)
    model = atp_patch.patch_model(tiny_model(KIND), weights=NAME)
    assert fault.happened == 1
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_a_download_that_stays_broken_leaves_nothing_half(
    hub: LoopbackHub, adapter: Files, expected: torch.Tensor
) -> None:
    hub.add(NAME, adapter)
    fault = hub.cut(f"GET .*{WEIGHTS}", times=99)
    assert "cannot be reached" in refusal()
    assert "not whole in the cache" in refusal(local_files_only=True)
    fault.times = 0
    model = atp_patch.patch_model(tiny_model(KIND), weights=NAME)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_arguments_of_the_hub_go_with_weights(tmp_path: Path) -> None:
    with pytest.raises(atp_patch.ConfigError, match="revision= says where weights= lie"):
        atp_patch.patch_model(tiny_model(KIND), revision="main")
    (tmp_path / CONFIG).write_bytes(keeping(0.3)[CONFIG])
    said = refusal(atp_patch.ConfigError, weights=tmp_path, revision="main")
    assert "is a folder here, which has no revision" in said
    assert "revision" in refusal(atp_patch.ConfigError, revision=3)
    assert "token" in refusal(atp_patch.ConfigError, token=3.5)


def test_a_folder_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / CONFIG).write_bytes(keeping(0.3)[CONFIG])
    assert kept(weights=tmp_path, subfolder="kept") == 0.3


def test_a_trained_adapter_with_its_lora(hub: LoopbackHub) -> None:
    from atp_patch.tools.trained import find_trained

    lora = {"lora/adapter_config.json": b"{}", "lora/adapter_model.safetensors": b""}
    commit = hub.add(NAME, {**keeping(0.3), **lora, "lora/training_args.bin": b"pickle"})
    found = find_trained(NAME, revision=commit)
    assert found.lora is not None
    assert {file.name for file in Path(found.lora).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert Path(found.lora).parent == Path(found.adapter)
    assert (Path(found.adapter) / CONFIG).is_file()
    model: Any = tiny_model(KIND)
    hub.add(NAME, keeping(0.3))
    assert atp_patch.load_trained(model, NAME, revision="main") is model
    assert require_patch(model).config.keep == (0.3,) * 3
