"""Reading a checkpoint's tensors one at a time, from a safetensors or .bin file or from shards."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atp_patch.contract.errors import ConfigError, WeightsError
from atp_patch.tools.files import parse_json
from atp_patch.tools.loading import first_line

NAMES = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the path of the file.
        what: what to give in place of a file that is missing or broken, for the error.

    Raises:
        ConfigError: where the file holds none.
    """
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; give {what}.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}); give {what}.") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds no JSON object; give {what}.")
    return table


@dataclass(frozen=True)
class Source:
    """A folder with weights.

    Attributes:
        folder: where the files are.
        prefix: is put before the tensors' names in the files.
    """

    folder: Path
    prefix: str = ""

    def files(self) -> list[Path]:
        """Return the weight files in order.

        Raises:
            WeightsError: where there are none, or not all that the index names.
        """
        for name in NAMES:
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                return self._shards(index)
            if (self.folder / name).is_file():
                return [self.folder / name]
        adapter = next(self.folder.glob("adapter_model.*"), None)
        if adapter is not None:
            raise WeightsError(f"{adapter} is a LoRA adapter; merge it into its model first.")
        raise WeightsError(
            f"{self.folder} holds no weights; put {' or '.join(NAMES)} there, or shards and their "
            "index."
        )

    def _shards(self, index: Path) -> list[Path]:
        where = read_json(index, "the index that belongs to the shards").get("weight_map")
        if not isinstance(where, dict):
            raise WeightsError(f"{index} has no weight_map; download it anew.")
        files = [self.folder / name for name in sorted(set(where.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise WeightsError(f"{index} names {', '.join(missing)}, missing there; download them.")
        return files

    def meta(self) -> Iterator[tuple[str, Tensor]]:
        """Return the names of all tensors, and for each a tensor of its shape and dtype without
        data.
        """
        for path in self.files():
            with _open(path) as file:
                for name in file.names():
                    yield self.prefix + name, file.meta(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Return all names and tensors in the order of :meth:`meta`, each read when it is asked
        for.
        """
        for path in self.files():
            with _open(path) as file:
                for name in file.names():
                    yield self.prefix + name, file.tensor(name)


class _SafeFile:
    """Tensors of a safetensors file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def names(self) -> list[str]:
        return sorted(self._file.keys())

    def meta(self, name: str) -> Tensor:
        part = self._file.get_slice(name)
        # An empty slice has the dtype, and no data is read for it.
        dtype = part[:0].dtype if part.get_shape() else self._file.get_tensor(name).dtype
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _PickleFile:
    """Tensors of a file that ``torch.save`` wrote."""

    def __init__(self, table: Mapping[str, Tensor]) -> None:
        self._table = table

    def names(self) -> list[str]:
        return sorted(self._table)

    def meta(self, name: str) -> Tensor:
        return self._table[name].to("meta")

    def tensor(self, name: str) -> Tensor:
        return self._table[name]


@contextmanager
def _open(path: Path) -> Iterator[_SafeFile | _PickleFile]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield _SafeFile(file)
        else:
            yield _PickleFile(_unpickled(path))
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise WeightsError(
            f"{path} cannot be read ({first_line(error)}); download it anew."
        ) from error


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    """Read a table of tensors, without running code that the file may hold. Files in the newer,
    zipped format are mapped into memory and not read at once.
    """
    try:
        table = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, and code from a file is not run; give safetensors, "
            "or a file of tensors alone."
        ) from error
    if not isinstance(table, dict) or not all(isinstance(x, Tensor) for x in table.values()):
        raise WeightsError(f"{path} is no table of tensors; give a model's state_dict.")
    return table
