"""The example that trains what stands for an image: it learns, stops, goes on, and is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import atp_patch
from atp_patch.builtin import load_builtin
from atp_patch.builtin.batches import Batch, BatchSpec, make_batch

pytest.importorskip("peft")
FILE = Path(__file__).parents[2] / "examples" / "train_compressed.py"


class StopError(Exception):
    """As if somebody pulled the plug."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, its batches drawn in this process, of two questions each."""
    spec = importlib.util.spec_from_file_location("train_compressed", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "batches", drawn)
    return module


def drawn(asked: BatchSpec, first: int, stop: int, broken_at: int | None = None) -> Iterator[Batch]:
    for number in range(first, stop):
        if number == broken_at:
            raise StopError
        yield make_batch(replace(asked, questions=2), number)


def run(example: Any, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    """What is learned at the end."""
    common = ["--images", "1", "--steps", "2", "--save-every", "1", "--questions", "0"]
    example.train(example.parse([*common, "--lora-rank", "2", "--out", str(out), *flags]))
    return torch.load(out / "checkpoint.pt", weights_only=True)["learned"]


METHODS = {"voco": ["--option", "num_tokens=2"], "prumerge+": ["--keep", "0.05"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_training_goes_on_as_if_it_had_not(
    method: str, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--method", method, *METHODS[method]]
    whole = run(example, tmp_path / "whole", *flags)
    assert any("lora_B" in name and bool(p.abs().sum() > 0) for name, p in whole.items())
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(example, "batches", lambda spec, a, b: drawn(spec, a, b, broken_at=1))
        with pytest.raises(StopError):
            run(example, stopped, *flags)
    with pytest.raises(SystemExit, match="--resume"):
        run(example, stopped, *flags)
    resumed = run(example, stopped, *flags, "--resume")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)
    model, _ = load_builtin()
    model.load_adapter(str(stopped / "lora"))
    atp_patch.patch_model(model, weights=stopped / "adapter")
    if method == "voco":
        tokens = load_file(stopped / "adapter" / "atp_model.safetensors")["embedding"]
        torch.testing.assert_close(tokens, whole["atp_patch_heads.embedding"])
    logits, _ = example.logits_of(model, make_batch(BatchSpec(1, questions=2), 9))
    assert bool(torch.isfinite(logits).all())


def test_seeds_see_other_scenes(example: Any) -> None:
    seen = []
    for seed in range(3):
        spec = example.scenes(example.parse(["--images", "2", "--steps", "5", "--seed", str(seed)]))
        seen.append({spec.offset + step * spec.images + k for step in range(5) for k in range(2)})
    assert seen[0] == set(range(10))
    assert len(set.union(*seen)) == 30


def test_what_learns_nothing_is_refused(example: Any, tmp_path: Path) -> None:
    asked = example.parse(["--method", "prumerge", "--learn", "tokens", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--learn lora"):
        example.train(asked)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--learn", "decoder", "--lora-rank", "8"], "--lora-rank goes with --learn lora"),
        (["--learn", "tokens", "--lr", "0.1"], "--lr goes with --learn lora or decoder"),
        (["--method", "prumerge", "--tokens-lr", "0.1"], "--tokens-lr goes with --method voco"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    example: Any, capsys: pytest.CaptureFixture[str], flags: list[str], why: str
) -> None:
    with pytest.raises(SystemExit):
        example.parse(flags)
    assert why in capsys.readouterr().err
