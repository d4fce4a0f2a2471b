"""Timed training steps: every way learns what its name says, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atp_patch.bench import training
from atp_patch.bench.__main__ import main
from atp_patch.bench.presets import PRESETS
from atp_patch.bench.training import WAYS, compare_steps
from tests.bench.test_bench import SMALL


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL["llava"][0])


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    options = ["--preset", "tiny", "--train", "--gradient-checkpointing", "--runs", "1"]
    assert main([*options, "--batch-size", "1", "--json", str(path)]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert list(case["ways"]) == [way.name for way in WAYS]
    assert case["gradient_checkpointing"] is True
    plain = case["ways"]["plain, decoder learns"]
    assert plain["time_ratio"] == 1.0
    assert all(one["step_ms"]["median"] > 0 for one in case["ways"].values())
    shown = capsys.readouterr().out
    assert all(f"| {way.name} |" in shown for way in WAYS)


def test_each_way_learns_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    preset, image, _ = SMALL["llava"]
    model: Any = preset.build(1.0, "sdpa", "cpu", torch.float32)
    inputs = preset.inputs(image, 1, 12, seed=0)
    text = inputs["input_ids"] != model.config.image_token_id
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned: list[set[str]] = []
    forget = model.zero_grad

    def note(set_to_none: bool = True) -> None:
        graded = [name for name, p in model.named_parameters() if p.grad is not None]
        learned.append({name.split(".")[0] for name in graded})
        forget(set_to_none)

    monkeypatch.setattr(model, "zero_grad", note)
    told: list[int] = []
    compare_steps(model, [2], inputs, text, runs=1, advance=told.append)
    assert told == [1] * 6
    decoder, heads = {"model", "lm_head"}, {"atp_patch_heads"}
    assert [way.name for way in WAYS] == [
        "plain, decoder learns",
        "atp, decoder learns",
        "atp, heads alone",
    ]
    # A round of warm-up, and one timed that begins with another way.
    assert learned == [decoder, decoder | heads, heads, decoder | heads, heads, decoder]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_labels_are_the_last_quarter_of_the_text() -> None:
    ids = torch.tensor([[1, 9, 9, 2, 3, 4, 5, 6, 7, 8]])
    labels = training._labels(ids, ids != 9)
    assert labels.tolist() == [[-100] * 8 + [7, 8]]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gradient-checkpointing"], "goes with --train"),
        (["--train", "--keep", "0.5"], "leave out --keep"),
        (["--train", "--methods", "fastv"], "leave out --methods"),
        (["--train", "--profile"], "leave out --profile"),
    ],
)
def test_bad_arguments(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", *options]) == 2
    assert told in capsys.readouterr().err
