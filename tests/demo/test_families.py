"""The demo on the other families, from folders of tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoProcessor, BatchFeature

from atp_patch.commands import demo
from tests.helpers.inputs import SINGLE, batch
from tests.helpers.tiny import ALL_KINDS, tiny_model


class StandIn:
    """A processor with a question and an image of its own (the real ones need more packages)."""

    chat_template = "any"
    image_processor = SimpleNamespace(do_normalize=False)

    def __init__(self, kind: str) -> None:
        self.inputs = BatchFeature(dict(batch(tiny_model(kind), SINGLE)))

    def apply_chat_template(self, chat: object, **kwargs: object) -> BatchFeature:
        """Whatever was asked."""
        return self.inputs

    def decode(self, ids: list[int], **kwargs: object) -> str:
        """The ids, as words."""
        return " ".join(str(int(token)) for token in ids)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_demo(
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "model")
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "image.png")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *a, **k: StandIn(kind))
    monkeypatch.setattr(demo, "RUNS", 1)
    argv = [tmp_path / "image.png", "What?", "--model", tmp_path / "model", "--layers", "2,5"]
    options = ["--keep", "0.5", "--max-new-tokens", "5", "--overlay", tmp_path / "o.png", "--json"]
    capsys.readouterr()
    assert demo.main([str(arg) for arg in (*argv, *options)]) == 0
    data = json.loads(capsys.readouterr().out)
    total = data["visual_tokens"]
    assert total == (36 if kind.startswith("llava") else 24)
    assert data["tokens_per_layer"] == [total] * 2 + [total // 2] * 3 + [total // 4] * 3
    assert len(data["answer_plain"].split()) == len(data["answer_pruned"].split()) == 5
    assert (tmp_path / "o.png").exists()
