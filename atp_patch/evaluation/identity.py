"""Everything that decides an answer: hashes of model, adapter and code, versions, and the date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from atp_patch.patching.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterSource
from atp_patch.tools.trained import LORA_FILES
from atp_patch.version import __version__

PACKAGE = Path(__file__).parents[1]
# The code that can change an answer, a question or what is kept. The demo, the bench, tables and
# plots cannot.
CODE = (
    *("contract/*.py", "maths/*.py", "methods/*.py", "families/*.py", "seam/**/*.py"),
    "patching/*.py",
    *(f"tools/{n}.py" for n in ("calibration", "generation", "loading", "observation")),
    *(f"tools/{n}.py" for n in ("threshold_controls", "trained", "visual_cache")),
    *(f"builtin/{n}.py" for n in ("scenes", "questions", "render", "glyphs", "silent")),
    *(f"builtin/{n}.py" for n in ("tokens", "vocabulary")),
    *(f"builtin/dynamic/{n}.py" for n in ("processing", "sizes", "tokens")),
    *(f"evaluation/{n}.py" for n in ("answers", "features", "prepare", "runner", "voco")),
    *(f"evaluation/{n}.py" for n in ("adapters", "settings", "layers_once", "images_once")),
    *(f"evaluation/{n}.py" for n in ("scenes", "shades", "tasks")),
)


def short_hash(data: Iterable[bytes]) -> str:
    """Return the first 12 hexadecimal digits of a SHA-256 hash."""
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()[:12]


def folder_hash(folder: Path, patterns: Iterable[str]) -> str:
    """Hash the names and contents of the files in a folder that match some patterns."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return short_hash(
        piece
        for file in files
        for piece in (str(file.relative_to(folder)).encode(), file.read_bytes())
    )


@cache  # the loaded code stays the same when its files change
def code_hash() -> str:
    """Hash the part of the package's code that can change an answer."""
    return folder_hash(PACKAGE, CODE)


def model_hash(model: Any) -> str:
    """Hash all parameters and buffers in a model's state dict, as they are in memory."""

    def pieces() -> Iterable[bytes]:
        for name, tensor in sorted(model.state_dict().items()):
            yield name.encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return short_hash(pieces())


def processor_hash(processor: Any) -> str:
    """Hash a processor's vocabulary, its chat template, and how it brings images to size."""
    said = [
        processor.tokenizer.get_vocab(),
        processor.chat_template,
        processor.image_processor.to_dict(),
    ]
    return short_hash([json.dumps(said, sort_keys=True, default=str).encode()])


def adapter_hash(source: str, lora: str | None = None) -> str:
    """Hash an adapter's files and those of the LoRA beside it.

    Raises:
        WeightsError: where there is no such folder, nor such an adapter on the Hub.
    """
    found = folder_hash(AdapterSource(source).folder, [CONFIG_FILE, WEIGHTS_FILE])
    if lora is None:
        return found
    return short_hash([found.encode(), folder_hash(Path(lora), LORA_FILES).encode()])


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute, and the hash of this package's code."""
    return {
        "atp_patch": __version__,
        "code": code_hash(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def today() -> str:
    """Return the date of today in UTC, as YYYY-MM-DD."""
    return datetime.now(timezone.utc).date().isoformat()
