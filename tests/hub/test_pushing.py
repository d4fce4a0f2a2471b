"""Adapters are pushed in one commit, whole or not at all, and come back the same."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalTokenNotFoundError

import atp_patch
from atp_patch.patching.adapter_card import KEEPS
from atp_patch.tools.publishing import push_folder
from tests.helpers.hub import LoopbackHub
from tests.helpers.tiny import tiny_model
from tests.hub.conftest import OTHER, READER, TOKEN
from tests.hub.test_loading import CONFIG, KIND, LAYERS, NAME, WEIGHTS, kept, logits

CARD = "README.md"
Push = Callable[..., str]


def learned(seed: int = 3) -> Any:
    torch.manual_seed(seed)
    model: Any = tiny_model(KIND)
    atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6)
    for parameter in model.atp_patch_heads.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.fixture(params=["push_to_hub", "save_pretrained", "push_folder"])
def push(request: pytest.FixtureRequest, tmp_path: Path) -> Push:
    """Each way to push a patched model's adapter."""

    def send(model: Any, name: str = NAME, **arguments: Any) -> str:
        if request.param == "push_to_hub":
            return atp_patch.push_to_hub(model, name, **arguments)
        folder = tmp_path / "pushed"
        if request.param == "save_pretrained":
            atp_patch.save_pretrained(model, folder, push_to_hub=True, repo_id=name, **arguments)
            return ""
        atp_patch.save_pretrained(model, folder)
        return push_folder(folder, name, **arguments)

    return send


# The loopback Hub has no Xet storage: the client with Xet keeps its files in git.
@pytest.mark.parametrize(("large", "xet"), [(None, True), (0, False)], ids=["Xet", "LFS"])
def test_what_is_pushed_comes_back(
    xet: bool, large: int | None, push: Push, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.large = large
    model = learned()
    address = push(model, token=TOKEN)
    assert set(hub.files(NAME)) == {".gitattributes", CARD, CONFIG, WEIGHTS}
    commit = hub.repositories[NAME].branches["main"]
    assert address in ("", f"{hub.url}/{NAME}/commit/{commit}")
    assert f'weights="{NAME}"' in hub.files(NAME)[CARD].decode()
    again = atp_patch.patch_model(tiny_model(KIND), weights=NAME, revision=commit)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_an_earlier_adapter_is_replaced_whole(push: Push, hub: LoopbackHub) -> None:
    push(learned(), token=TOKEN)
    hub.add(NAME, {**hub.files(NAME), "notes.txt": b"mine"})
    push(atp_patch.patch_model(tiny_model(KIND), LAYERS, "fastv", keep=0.3), token=TOKEN)
    assert set(hub.files(NAME)) == {".gitattributes", CARD, CONFIG, "notes.txt"}
    assert kept(weights=NAME) == 0.3


def refusal(push: Push, name: str = NAME, **arguments: Any) -> str:
    with pytest.raises(atp_patch.HubError) as refused:
        push(learned(), name, **arguments)
    said = str(refused.value)
    assert "\n" not in said
    assert "not pushed" in said
    return said


def test_who_may_not_push_is_told_why(
    push: Push, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "needs a token; log in with `hf auth login`" in refusal(push)
    assert "does not know this token" in refusal(push, token="hf_nobodys")
    assert "may not write to 'ann/adapter'" in refusal(push, token=READER)
    hub.add(NAME, {"notes.txt": b"hers"})
    assert "may not write to 'ann/adapter'" in refusal(push, token=OTHER)
    hub.add(NAME, {"notes.txt": b"hers"}, private=True)
    assert "may not write to" in refusal(push, token=OTHER)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal(push, token=TOKEN)
    assert hub.files(NAME) == {"notes.txt": b"hers"}


@pytest.mark.parametrize("name", ["two/slashes/here", "a" * 300, "\ud800", ""])
def test_a_name_that_is_no_repositorys(name: str, hub: LoopbackHub, tmp_path: Path) -> None:
    assert "give one like USER/REPOSITORY" in refusal(atp_patch.push_to_hub, name, token=TOKEN)
    assert hub.requests == []


def test_a_private_repository_is_made(push: Push, hub: LoopbackHub) -> None:
    push(learned(), token=TOKEN, private=True)
    assert hub.repositories[NAME].private
    atp_patch.patch_model(tiny_model(KIND), weights=NAME, token=TOKEN)


@pytest.mark.parametrize(
    ("broken", "large"), [("PUT /lfs", 0), ("POST .*/commit/", 0), ("POST .*/commit/", None)]
)
def test_an_upload_that_breaks_leaves_the_earlier_adapter(
    broken: str, large: int | None, hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.large = large
    atp_patch.save_pretrained(learned(1), tmp_path / "one")
    atp_patch.save_pretrained(learned(2), tmp_path / "two")
    push_folder(tmp_path / "one", NAME, token=TOKEN)
    before = hub.files(NAME)
    fault = hub.cut(broken, times=99)
    said = refusal(lambda model, name, **more: push_folder(tmp_path / "two", name, token=TOKEN))
    assert "cannot be reached" in said
    assert hub.files(NAME) == before
    fault.times = 0
    push_folder(tmp_path / "two", NAME, token=TOKEN)
    assert hub.files(NAME)[WEIGHTS] == (tmp_path / "two" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("large", [None, 0], ids=["in git", "in LFS"])
def test_two_uploads_at_once_leave_one_of_both_whole(
    large: int | None, hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.large = large
    names = ["one", "two"]
    for seed, name in enumerate(names):
        model = learned(seed)
        atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6 + 2 * seed)
        atp_patch.save_pretrained(model, tmp_path / name)
    failed: list[BaseException] = []

    def push(name: str) -> None:
        try:
            push_folder(tmp_path / name, NAME, token=TOKEN)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=push, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    commits = list(hub.repositories[NAME].commits.values())[1:]
    assert len(commits) == 2
    sent = [
        {name: (tmp_path / folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        for folder in names
    ]
    for files in commits:
        assert {name: files[name] for name in (CONFIG, WEIGHTS)} in sent
    atp_patch.patch_model(tiny_model(KIND), weights=NAME)


def test_a_branch_is_made_and_pushed_to(hub: LoopbackHub, tmp_path: Path) -> None:
    for keep in (0.3, 0.6):
        model = atp_patch.patch_model(tiny_model(KIND), LAYERS, "fastv", keep=keep)
        atp_patch.save_pretrained(model, tmp_path)
        branch = None if keep == 0.3 else "trial"
        push_folder(tmp_path, NAME, token=TOKEN, revision=branch, message=f"{keep}")
    assert kept(weights=NAME) == 0.3
    assert kept(weights=NAME, revision="trial") == 0.6
    assert list(hub.repositories[NAME].messages.values())[1:] == ["0.3", "0.6"]


def test_a_folder_without_a_whole_adapter_is_not_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(atp_patch.ConfigError, match="is no folder"):
        push_folder(tmp_path / "lost", NAME, token=TOKEN)
    with pytest.raises(atp_patch.WeightsError, match="is no adapter"):
        push_folder(tmp_path, NAME, token=TOKEN)
    atp_patch.save_pretrained(learned(), tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"half")
    with pytest.raises(atp_patch.WeightsError, match="not a safetensors file"):
        push_folder(tmp_path / "adapter", NAME, token=TOKEN)
    assert hub.requests == []


def test_a_training_is_pushed_with_its_lora_and_without_its_checkpoints(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    atp_patch.save_pretrained(learned(), tmp_path / "adapter")
    (tmp_path / "lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "training_args.bin"):
        (tmp_path / "lora" / name).write_bytes(b"{}")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    push_folder(tmp_path, NAME, token=TOKEN)
    lora = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    assert set(hub.files(NAME)) == {".gitattributes", CARD, CONFIG, WEIGHTS} | lora
    push_folder(tmp_path / "adapter", NAME, token=TOKEN)
    assert lora < set(hub.files(NAME))
    shutil.rmtree(tmp_path / "lora")
    push_folder(tmp_path, NAME, token=TOKEN)
    assert not lora & set(hub.files(NAME))


def test_what_the_author_wrote_into_the_card_stays(hub: LoopbackHub, tmp_path: Path) -> None:
    atp_patch.save_pretrained(learned(), tmp_path)
    card = (tmp_path / CARD).read_text() + "\nTrained on my own pictures.\n"
    (tmp_path / CARD).write_text(card)
    push_folder(tmp_path, NAME, token=TOKEN, license="mit", results="It keeps 98 %.")
    pushed = hub.files(NAME)[CARD].decode()
    assert pushed.count("license: mit") == 1
    assert f"{KEEPS}\n\nIt keeps 98 %.\n\n## Limits" in pushed
    assert pushed.endswith("\nTrained on my own pictures.\n")
    assert str(tmp_path) not in pushed
    assert (tmp_path / CARD).read_text() == card


@pytest.mark.parametrize(
    ("cause", "mend"),
    [
        (LocalTokenNotFoundError("Token is required, but no token found."), "hf auth login"),
        (ConnectionResetError(104, "reset by peer"), "check the network"),
        (OSError(28, "No space left on device"), "make room"),
        (RuntimeError("xet: the upload failed"), "try again"),
        (ValueError("Invalid metadata in README.md.\n- license"), "Invalid metadata"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_loopback_hub_cannot_show(
    cause: Exception, mend: str, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise cause

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    said = refusal(atp_patch.push_to_hub, token=TOKEN)
    assert "ann/adapter" in said
    assert mend in said
