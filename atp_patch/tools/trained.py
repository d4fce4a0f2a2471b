"""The results of trainings: an adapter, and the LoRA that learned beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atp_patch.builtin import builtin_path
from atp_patch.contract.arguments import as_kind, shown
from atp_patch.contract.errors import ConfigError, WeightsError, first_line
from atp_patch.patching.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSource,
    is_folder,
    read_text,
)
from atp_patch.patching.adapter_loading import check_values
from atp_patch.patching.api import patch_model
from atp_patch.patching.config import parse_table

LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX, _UP, _DOWN = "base_model.model.", ".lora_B.weight", ".lora_A.weight"
_ADDED = "_atp_patch_lora"  # attribute of a model: the LoRA that load_trained has added
_BASE = ".base_layer.weight"  # ends the name of an output layer's weight without LoRA
_NOT_PLAIN = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Trained:
    """The places of a training's results.

    Attributes:
        adapter: folder of the adapter.
        lora: folder of the LoRA; None where none learned beside the adapter.
    """

    adapter: str
    lora: str | None


def shipped() -> tuple[str, ...]:
    """Return the names of the built-in model's trained adapters that come with the package."""
    return tuple(sorted(folder.parent.name for folder in _shipped().glob("*/adapter")))


def find_trained(source: str, **hub: Any) -> Trained:
    """Find the results of a training; from the Hub they are downloaded.

    Args:
        source: a name of :func:`shipped`, the folder of a training (with the folder ``adapter`` in
            it, and ``lora`` where that learned), an adapter's own folder, or the name of a Hub
            repository, where the adapter lies at the top and its LoRA in the folder ``lora``. A
            revision may follow the name: "user/repository@revision".
        hub: ``revision``, ``token``, ``subfolder``, ``cache_dir`` and ``local_files_only`` as
            :func:`atp_patch.patch_model` takes them.

    Raises:
        HubError: where the Hub refuses the files or cannot be reached.
        WeightsError: for the folder of a training whose whole model learned, or where there is no
            adapter.
    """
    if isinstance(source, str) and source in shipped() and not Path(source).exists():
        source = str(_shipped() / source)
    if isinstance(source, str) and "@" in source and not is_folder(source):
        source, _, named = source.rpartition("@")  # which no name of a repository holds
        hub = {**hub, "revision": hub.get("revision") or named}
    where = AdapterSource.of(source, "source", **hub)
    if not where.is_local:
        folder = where.with_files(CONFIG_FILE, WEIGHTS_FILE, *(f"lora/{f}" for f in LORA_FILES))
        return Trained(str(folder), _lora(folder))
    folder = Path(where.place, where.subfolder)
    if not (folder / "adapter").is_dir():
        beside = folder.parent if folder.name == "adapter" else folder
        return Trained(str(folder), _lora(beside))
    if (folder / "model").is_dir():
        raise WeightsError(
            f"in {source} the model learned too: load {folder / 'model'}, and with it the adapter "
            f"{folder / 'adapter'}."
        )
    return Trained(str(folder / "adapter"), _lora(folder))


def _lora(training: Path) -> str | None:
    """Return the folder of the LoRA in a training's folder, or None."""
    return str(training / "lora") if (training / "lora").is_dir() else None


def load_trained(
    model: Any,
    source: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """Patch a model with a trained adapter, and add the LoRA beside it to the model's weights.

        model, processor = load_builtin()
        load_trained(model, "voco8")

    Args:
        source: as :func:`find_trained` takes it: a name of the package's own adapters, the folder
            of a training or of an adapter, or the name of a Hub repository.
        revision, token, subfolder, cache_dir, local_files_only: as :func:`atp_patch.patch_model`
            takes them, for a Hub repository.

    Returns:
        the same model. Unpatching does not take the LoRA out of its weights; :func:`merged` adds
        one inside a context.

    Raises:
        WeightsError: where it was made for another model, or a LoRA was added before. The model
            stays as it was then.
        HubError: where the Hub refuses the files or cannot be reached.
    """
    found = find_trained(
        source,
        revision=revision,
        token=token,
        subfolder=subfolder,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    changes = [] if found.lora is None else _changes(model, found.lora)
    earlier = getattr(model, _ADDED, None)
    if changes and earlier is not None:
        raise WeightsError(
            f"the LoRA of {earlier} is in this model's weights already; load the model anew, then "
            f"{source}."
        )
    patch_model(model, weights=found.adapter)
    if changes:
        setattr(model, _ADDED, source)
    _add(changes)
    return model


@contextmanager
def merged(model: Any, lora: str | None) -> Iterator[None]:
    """Add the LoRA of a folder to a model's weights inside this context.

    Afterwards the weights are exactly what they were before.

    Args:
        model: with the modules that the LoRA changes.
        lora: folder that PEFT, or ``save_pretrained`` of a model with LoRA, wrote; None: nothing is
            added.

    Raises:
        WeightsError: where the folder holds no plain LoRA, or that of another model.
    """
    changes = [] if lora is None else _changes(model, lora)
    before = [weight.detach().clone() for weight, _ in changes]
    try:
        _add(changes)
        yield
    finally:
        with torch.no_grad():
            for (weight, _), kept in zip(changes, before, strict=True):
                weight.copy_(kept)


def changes_features(model: Any, lora: str) -> bool:
    """Return whether a LoRA changes image features, in the vision tower or the projector."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    changed = [modules[name] for name in _deltas(lora, _written(lora))]
    return any(id(module) not in decoder and module is not head for module in changed)


def _shipped() -> Path:
    return builtin_path().parent / "adapters"


def _changes(model: Any, folder: str) -> list[tuple[Tensor, Tensor]]:
    """Return the weights that a LoRA changes, each with what is added to it."""
    modules, changes = dict(model.named_modules()), []
    for name, (delta, base) in _deltas(folder, _written(folder)).items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != delta.shape:
            raise WeightsError(f"{folder} was made for another model: it changes {name}.")
        if weight.is_meta:
            raise WeightsError(
                f"the weights of {name} are not in memory (offloaded), so {folder} cannot be added "
                "to them; load the model without offloading."
            )
        if base is not None and not torch.equal(base.to(weight), weight):
            raise WeightsError(f"{folder} was made for another model: {name} is not as it was.")
        changes.append((weight, delta))
    return changes


@torch.no_grad()
def _add(changes: Iterable[tuple[Tensor, Tensor]]) -> None:
    for weight, delta in changes:
        weight.add_(delta.to(weight))


def _written(folder: str) -> tuple[tuple[str, int], ...]:
    """Return the paths of a LoRA's files, each with the time in ns when it was written."""
    files = [Path(folder, name).resolve() for name in LORA_FILES]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{folder} holds no LoRA: {' and '.join(missing)} missing.")
    return tuple((str(file), file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=8)
def _deltas(
    folder: str, written: tuple[tuple[str, int], ...]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return what LoRA adds to each linear layer's weight, and that weight if PEFT wrote it.

    Args:
        folder: the folder of the LoRA.
        written: what :func:`_written` gives, so that a changed file is read again.
    """
    scale, stored = _scale(folder), _stored(folder)
    changed = [name.removesuffix(_UP) for name in stored if name.endswith(_UP)]
    alone = sorted(name for name in changed if name + _DOWN not in stored)
    if alone:
        raise WeightsError(f"{folder}/{LORA_FILES[1]} holds half of {shown(alone[0])} alone.")
    known = {name + part for name in changed for part in (_UP, _DOWN, _BASE)}
    more = sorted(stored.keys() - known)
    if more:  # modules_to_save, biases, embeddings
        raise WeightsError(
            f"{folder} holds more than LoRA of linear layers ({shown(more[0])}); load it with "
            "PEFT, merge it into the model, and give that model."
        )
    deltas = {}
    for name in changed:
        up, down = stored[name + _UP].float(), stored[name + _DOWN].float()
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise WeightsError(
                f"{folder}/{LORA_FILES[1]}: both halves of {shown(name)} do not fit each other."
            )
        deltas[name.removeprefix(_PREFIX)] = scale * (up @ down), stored.get(name + _BASE)
    return deltas


def _scale(folder: str) -> float:
    """Return the number by which the product of a LoRA's two factors is multiplied.

    Raises:
        WeightsError: where its configuration is broken, or is not that of a plain LoRA.
    """
    where = f"{folder}/{LORA_FILES[0]}"
    text = read_text(Path(folder) / LORA_FILES[0], where)
    try:
        config = parse_table(text)
        if config.get("peft_type") != "LORA" or any(config.get(name) for name in _NOT_PLAIN):
            raise ConfigError("this is no plain LoRA; merge it into the model and give --model.")
        rank: int = as_kind("r", config.get("r"), "int")
        alpha: float = as_kind("lora_alpha", config.get("lora_alpha"), "float")
        root = as_kind("use_rslora", config.get("use_rslora"), "bool | None")
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from error
    if rank < 1:
        raise WeightsError(f"{where}: r={rank} must be at least 1.")
    return alpha / (rank**0.5 if root else rank)


def _stored(folder: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA.

    Raises:
        WeightsError: where the file is broken, or holds what cannot be computed with.
    """
    where = f"{folder}/{LORA_FILES[1]}"
    try:
        stored = load_file(Path(folder) / LORA_FILES[1])
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{where} is not a safetensors file ({first_line(error)}).") from error
    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            raise WeightsError(f"{where}: {shown(name)} is of {tensor.dtype}, which no LoRA is.")
    check_values(stored, where)
    return stored
