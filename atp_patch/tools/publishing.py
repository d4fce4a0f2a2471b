"""Publishing the folder of an adapter or of a training on the Hub, in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from atp_patch.contract.errors import ConfigError, HubError, WeightsError
from atp_patch.patching.adapter import Adapter
from atp_patch.patching.adapter_card import Beside, at_place, with_license, with_results
from atp_patch.patching.adapter_files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSource,
    read_text,
)
from atp_patch.patching.adapter_loading import load_adapter
from atp_patch.patching.hub_errors import HUB_ERRORS, explained
from atp_patch.tools.trained import LORA_FILES

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,  # noqa: A002  (the Hub's name for it)
    results: str | None = None,
    message: str | None = None,
) -> str:
    """Push the adapter in a folder to a repository on the Hub.

    The adapter goes to the top of the repository, and what learned beside it into the folder
    ``lora`` or ``model``. ``patch_model(weights=repo_id)`` and ``load_trained(model, repo_id)``
    load it from there. Files of an earlier adapter that this one has not got are removed. All of it
    is one commit: whoever loads from the repository gets the one or the other adapter whole.

    Args:
        folder: what ``save_pretrained`` or a training wrote.
        repo_id: the name of the repository, USER/REPOSITORY; it is made if it is not there.
        token: the token to write with; by default the one that ``hf auth login`` stored.
        private: whether a new repository is private; None: as the account is set.
        revision: the branch to push to, which is made if it is not there; None: the default branch.
        license: the licence that the card names, by the Hub's name for it.
        results: Markdown on what was measured, for the card.
        message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        WeightsError: if the folder holds no adapter, or a damaged one. Nothing was pushed then.
        HubError: if the Hub refuses the push or cannot be reached. The repository's files are
            unchanged then; pushing again goes on.
    """
    top, beside = _parts(Path(folder))
    loaded = load_adapter(AdapterSource(str(top)))
    kind: Beside | None = None if beside is None else ("lora" if beside.name == "lora" else "model")
    card = _card(top, Adapter(loaded.config, loaded.tensors, loaded.made_with, kind), repo_id)
    card = card if license is None else with_license(card, license)
    card = card if results is None else with_results(card, results)
    files: dict[str, bytes | Path] = {CARD_FILE: card.encode(), CONFIG_FILE: top / CONFIG_FILE}
    if loaded.tensors:
        files[WEIGHTS_FILE] = top / WEIGHTS_FILE
    if beside is not None:
        files |= {f"{beside.name}/{name}": path for name, path in _beside(beside)}
    api = HfApi(token=token, library_name="atp_patch")
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.list_repo_files(name, revision=revision)
        stale = [path for path in there if _ours(path) and path not in files]
        commit = api.create_commit(
            name,
            [
                *(CommitOperationDelete(path) for path in stale),
                *(CommitOperationAdd(path, content) for path, content in sorted(files.items())),
            ],
            commit_message=message or f"Adapter of atp_patch: {loaded.config.name}",
            revision=revision,
        )
    except HUB_ERRORS as error:
        said = explained(error, repo_id, revision, writing=True)
        raise HubError(f"{folder} was not pushed: {said}") from error
    return str(commit.commit_url)


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """Return the folder of the adapter, and that of what learned beside it, or None.

    Raises:
        ConfigError: if there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give one that save_pretrained or train wrote.")
    inside = folder.name == "adapter" and not (folder / "adapter").is_dir()
    training = folder.parent if inside else folder
    top = training / "adapter" if (training / "adapter").is_dir() else folder
    found = [training / name for name in ("lora", "model") if (training / name).is_dir()]
    return top, found[0] if found else None


def _beside(folder: Path) -> Iterator[tuple[str, Path]]:
    """Return names and paths of the files of a LoRA or model, whose weights are safetensors."""
    if folder.name == "lora":
        missing = [name for name in LORA_FILES if not (folder / name).is_file()]
        if missing:
            raise WeightsError(f"{folder} holds no LoRA: {' and '.join(missing)} missing.")
        yield from ((name, folder / name) for name in LORA_FILES)
        return
    kinds = (".json", ".jinja", ".safetensors", ".txt", ".model")
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in kinds:
            yield path.name, path


def _card(top: Path, adapter: Adapter, repo_id: str) -> str:
    """Return the card in the folder, or a new one, with lines that load it from the repository."""
    file = top / CARD_FILE
    card = read_text(file, str(file)) if file.is_file() else adapter.card()
    return at_place(card, repo_id)


def _ours(path: str) -> bool:
    """Return whether a file of a repository belongs to an adapter as it is pushed here."""
    return path in ADAPTER_FILES or path.startswith(("lora/", "model/"))
