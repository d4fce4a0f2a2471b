"""A model folder to train (36 visual tokens, 8 layers, random), and data in LLaVA's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from atp_patch.builtin import make_scene
from tests.evaluation.conftest import build

Record = dict[str, Any]
Writer = Callable[..., Path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and its processor on disk."""
    path = tmp_path_factory.mktemp("model")
    for part in build():
        part.save_pretrained(path)
    return path


def record(**changes: Any) -> Record:
    """A good sample; ``changes`` replace its entries, None takes one out."""
    whole = {
        "id": "1",
        "image": "scene.png",
        "conversations": [
            {"from": "human", "value": "<image>\nHow many red shapes are there?"},
            {"from": "gpt", "value": "2"},
        ],
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not None}


@pytest.fixture
def data(tmp_path: Path) -> Writer:
    """Writes samples to a file beside two good images, a broken one and one that is no image."""
    make_scene("train", 0).image.save(tmp_path / "scene.png")
    make_scene("train", 1).image.save(tmp_path / "other.png")
    Image.new("RGB", (400, 300)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "scene.png").read_bytes()[:200])
    (tmp_path / "words.png").write_text("no image", encoding="utf-8")

    def write(samples: list[Any], name: str = "mix.json") -> Path:
        text = json.dumps(samples)
        if name.endswith(".jsonl"):
            lines = (s if isinstance(s, str) else json.dumps(s) for s in samples)
            text = "\n".join(lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write
