"""The command on bad data, and the recipes that ship."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import atp_patch
from atp_patch import train as command
from atp_patch.builtin import DYNAMIC, LLAVA, load_builtin
from atp_patch.training.command import train
from atp_patch.training.settings import read_settings
from tests.training.conftest import Writer, record
from tests.training.runs import LAYERS, history

ROOT = Path(__file__).parents[2]


def test_bad_samples_are_skipped_and_counted(folder: Path, tmp_path: Path, data: Writer) -> None:
    good, late, early = record(), record(image="broken.png"), record(image="nothing.png")
    file = data([good, good, late, good, early, good, good, good])
    argv = ["--model", folder, "--data", file, "--out", tmp_path / "out", "--layers", "2,4,6"]
    argv += ["--batch-size", 4, "--epochs", 2, "--log-every", 1, "--device", "cpu", "--skip-bad"]
    assert command.main([str(arg) for arg in argv]) == 0
    assert history(tmp_path / "out")[-1]["skipped"] == 2
    card = (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "mix.json, 8 samples; 2 were found bad and left out" in card


def test_a_bad_sample_ends_the_training_and_keeps_what_was_learned(
    folder: Path, tmp_path: Path, data: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data([record()] * 30 + [record(image="broken.png")])
    argv = ["--model", folder, "--data", file, "--out", tmp_path / "out", "--layers", "2,4,6"]
    argv += ["--batch-size", 1, "--epochs", 1, "--log-every", 1, "--device", "cpu", "--seed", 3]
    assert command.main([str(arg) for arg in argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "sample 30 of mix.json" in last
    assert "--skip-bad" in last
    saved = re.search(r"in (\S+checkpoint-\d+)", last)
    assert saved is not None
    assert Path(saved[1]).is_dir()


def test_the_papers_recipe_reads_as_it_stands(folder: Path, tmp_path: Path, data: Writer) -> None:
    """The recipe with its sizes made small, on a mixture with text alone."""
    words = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "yes"}]
    file = data([record(), record(image=None, conversations=words)] * 4)
    small = {
        "model": str(folder),
        "data": str(file),
        "out": str(tmp_path / "out"),
        "layers": LAYERS,
        "target_tokens": 12,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 60,
        "dtype": "float32",
        "deepspeed": None,
        "gradient_checkpointing": True,
        "workers": 0,
        "log_every": 1,
        "device": "cpu",
    }
    recipe = ROOT / "examples" / "llava15_665k.yaml"
    settings = read_settings(recipe, {k: "none" if v is None else v for k, v in small.items()})
    assert not settings.freeze_lm
    assert settings.options["target_loss"] == "paper"
    adapter = train(settings)
    assert len(history(tmp_path / "out")) == 2
    assert (adapter.parent / "model" / "config.json").is_file()


@pytest.mark.slow
def test_the_papers_recipe_on_the_builtin_model(tmp_path: Path) -> None:
    """With its own layers, target and bfloat16: sizes alone are others."""
    argv = [str(ROOT / "examples" / "llava15_665k.yaml"), "--model", "builtin", "--data", "builtin"]
    argv += ["--out", str(tmp_path), "--batch-size", "2", "--micro-batch-size", "1", "--steps", "2"]
    argv += ["--deepspeed", "none", "--workers", "0", "--calibrate", "0", "--log-every", "1"]
    assert command.main([*argv, "--device", "cpu"]) == 0
    lines = history(tmp_path)
    assert [line["visual_tokens"] for line in lines] == [576, 576]
    assert all(100 < line["average_tokens"] < 160 for line in lines)
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "least", "most"),
    [("builtin_frozen", LLAVA, 576, 576), ("builtin_paper", DYNAMIC, 144, 225)],
)
def test_the_builtin_examples(name: str, model: str, least: int, most: int, tmp_path: Path) -> None:
    file = ROOT / "examples" / f"{name}.yaml"
    argv = [str(file), "--out", str(tmp_path), "--steps", "2", "--batch-size", "2"]
    assert command.main([*argv, "--log-every", "1", "--device", "cpu"]) == 0
    patched, _ = load_builtin(model)
    atp_patch.patch_model(patched, weights=tmp_path / "adapter")
    seen = [line["visual_tokens"] for line in history(tmp_path)]
    assert len(seen) == 2
    assert all(least <= tokens <= most for tokens in seen)
