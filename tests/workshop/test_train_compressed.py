"""The program that trains what stands for an image: it learns, stops, goes on, and is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import atp_patch
from atp_patch.builtin import NAMES, load_builtin, prompt
from atp_patch.builtin.tokens import PAD, word_ids
from tests.helpers.compare import assert_close
from workshop import train_compressed
from workshop.batches import Batch, BatchSpec

pytest.importorskip("peft")


class StopError(Exception):
    """As if somebody pulled the plug."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, its batches drawn in this process, of two questions each."""
    monkeypatch.setattr(train_compressed, "batches", drawn)
    return train_compressed


def drawn(
    asked: BatchSpec,
    first: int,
    stop: int,
    make: Callable[[BatchSpec, int], Batch],
    broken_at: int | None = None,
) -> Iterator[Batch]:
    for number in range(first, stop):
        if number == broken_at:
            raise StopError
        yield make(replace(asked, questions=2), number)


def run(example: Any, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    """What is learned at the end."""
    common = ["--images", "1", "--steps", "2", "--save-every", "1", "--questions", "0"]
    example.train(example.parse([*common, "--lora-rank", "2", "--out", str(out), *flags]))
    return torch.load(out / "checkpoint.pt", weights_only=True)["learned"]


METHODS = {"voco": ["--option", "num_tokens=2"], "prumerge+": ["--keep", "0.05"]}


SMALL = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "builtin" else name for name in NAMES],
)


@pytest.mark.parametrize("method", METHODS)
@SMALL
def test_a_stopped_training_goes_on_as_if_it_had_not(
    name: str, method: str, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", name, "--method", method, *METHODS[method]]
    whole = run(example, tmp_path / "whole", *flags)
    assert any("lora_B" in name and bool(p.abs().sum() > 0) for name, p in whole.items())
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(example, "batches", lambda *args: drawn(*args, broken_at=1))
        with pytest.raises(StopError):
            run(example, stopped, *flags)
    with pytest.raises(SystemExit, match="--resume"):
        run(example, stopped, *flags)
    resumed = run(example, stopped, *flags, "--resume")
    assert resumed.keys() == whole.keys()
    for parameter, tensor in whole.items():
        torch.testing.assert_close(resumed[parameter], tensor)
    model, processor = load_builtin(NAMES[name])
    model.load_adapter(str(stopped / "lora"))
    atp_patch.patch_model(model, weights=stopped / "adapter")
    if method == "voco":
        tokens = load_file(stopped / "adapter" / "atp_model.safetensors")["embedding"]
        torch.testing.assert_close(tokens, whole["atp_patch_heads.embedding"])
    spec, draw = example.scenes(example.parse(["--model", name, "--images", "1"]), questions=2)
    logits, _ = example.logits_of(model, processor, draw(spec, 9))
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("method", METHODS)
@SMALL
def test_questions_on_the_cache_are_answered_as_in_one_pass(
    name: str, method: str, example: Any
) -> None:
    asked = example.parse(["--model", name, "--method", method, *METHODS[method], "--images", "2"])
    model, processor = example.build(asked)
    spec, draw = example.scenes(asked, questions=2)
    batch = draw(spec, 1)
    model.eval()
    with torch.no_grad():
        logits, targets = example.logits_of(model, processor, batch)
        for row, ids in enumerate(batch["ids"].reshape(4, -1)):
            picture = batch.get("shown", batch["pixels"])[row // 2]
            inputs = processor(images=picture, text=prompt("", NAMES[name]), return_tensors="pt")
            asked_ids = torch.tensor(ids[ids != word_ids()[PAD]])
            begun = inputs["input_ids"][0, :-1]  # but for "ASSISTANT:"
            inputs["input_ids"] = torch.cat([begun, asked_ids])[None]
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:
                kinds = inputs["mm_token_type_ids"][0, :-1]
                inputs["mm_token_type_ids"] = torch.cat([kinds, 0 * asked_ids])[None]
            whole = model(**inputs).logits[0, -len(asked_ids) :]
            assert_close(logits[row, : len(asked_ids)], whole, tolerance=1e-4)
            np.testing.assert_array_equal(targets[row], batch["targets"].reshape(4, -1)[row])


@pytest.mark.parametrize("name", NAMES)
def test_seeds_see_other_scenes(
    name: str, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []

    def noted(spec: BatchSpec, first: int, stop: int, make: Any) -> Iterator[Batch]:
        scenes = {spec.offset + step * spec.images + k for step in range(5) for k in range(2)}
        seen.append(scenes)
        assert (first, stop) == (0, 5)
        raise StopError

    monkeypatch.setattr(example, "batches", noted)
    for seed in range(3):
        flags = ["--model", name, "--images", "2", "--steps", "5", "--seed", str(seed)]
        with pytest.raises(StopError):
            example.train(example.parse([*flags, "--out", str(tmp_path / str(seed))]))
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
