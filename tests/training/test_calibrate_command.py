"""``atp-patch calibrate`` sets an adapter to a budget, and saves it with what it came with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.commands.calibrate import main
from tests.training.runs import heads, plain, question, run


def command(folder: Path, *more: object) -> int:
    argv = ["--model", folder, "--device", "cpu", "--samples", 12, "--json", *more]
    return main([str(part) for part in argv], "atp-patch calibrate")


def test_an_adapter_with_its_lora_meets_the_budget(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    run(folder, tmp_path / "training", steps=1, lora_rank=2)
    out = tmp_path / "out"
    capsys.readouterr()
    given = ["--weights", tmp_path / "training", "--target-tokens", 14, "--out", out]
    assert command(folder, *given) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["samples"], told["target"]) == (str(out), 12, 14)
    assert told["after"] == pytest.approx(14, rel=0.01)
    assert {path.name for path in out.iterdir()} == {"adapter", "lora"}
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "## Calibration" in card
    assert 'load_trained(model, "out")' in card
    model = atp_patch.load_trained(plain(folder), str(out))
    averages = []
    for number in range(12):
        with torch.no_grad():
            model(**question(folder, number))
        averages.append(atp_patch.last_trace(model).average_tokens)
    assert sum(averages) / 12 == pytest.approx(14, rel=0.01)
    before, after = heads(tmp_path / "training" / "adapter"), heads(out / "adapter")
    assert set(before) == set(after)


def test_untrained_thresholds_can_be_calibrated(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert command(folder, "--layers", "2,4,6", "--target-tokens", 12, "--out", out) == 0
    assert json.loads(capsys.readouterr().out)["after"] == pytest.approx(12, rel=0.01)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "atp_config.json",
        "atp_model.safetensors",
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--samples", 0], "--samples 0 must be at least 1"),
        (["--out", "{tmp}"], "is there already; give a new folder"),
        (["--weights", "no/such/adapter"], "neither a folder nor the name of a repository"),
        (["--data", "lost.json"], "lost.json"),
        (["--target-tokens", 1], "target_tokens=1"),
    ],
)
def test_what_is_wrong_is_one_line(
    more: list[Any], said: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    given = [str(part).format(tmp=tmp_path) for part in more]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert command(folder, *out, *given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("atp-patch calibrate: ")
    assert said in error
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path)
