"""What the demo prints and draws, on a whole checkpoint of random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

import atp_patch
from atp_patch.commands import demo
from atp_patch.commands.cli import main as cli

QUESTION = "How many red shapes are there?"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time once: the times play no part."""
    monkeypatch.setattr(demo, "RUNS", 1)


def found(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    """The JSON of a demo run, which must be all that is on stdout."""
    assert demo.main([str(arg) for arg in (*argv, "--json", "--max-new-tokens", 4)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("quick")
def test_json_holds_everything_and_it_adds_up(
    scene: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "survivors.png"
    data = found(capsys, scene, QUESTION, "--model", checkpoint, "--overlay", picture)
    assert data["visual_tokens"] == 144
    assert data["method"] == "atp"
    assert data["note"] is None
    # The budget is a quarter where nothing is asked, within a token.
    assert data["average_tokens"] == pytest.approx(36, abs=1)
    per_layer = data["tokens_per_layer"]
    assert len(per_layer) == 32
    assert data["average_tokens"] == pytest.approx(sum(per_layer) / 32)
    assert per_layer[:4] == [144] * 4
    assert [row["layer"] for row in data["layers"]] == [4, 14, 24]
    for row in data["layers"]:
        assert (row["tokens_in"], row["tokens_kept"]) == (
            per_layer[row["layer"] - 1],
            per_layer[row["layer"]],
        )
        assert set(row["thresholds"]) == {"redundant", "spatial"}
    assert data["flops"] < data["flops_plain"]
    # Two heads of 16 in float32, keys and values, for each token of each layer.
    text = data["kv_bytes_plain"] / (2 * 32 * 4) / 32 - 144
    assert text == int(text) > 0
    assert data["kv_bytes"] == 2 * 32 * 4 * sum(n + text for n in per_layer)
    times = data["times"]
    assert times["prefill_speedup"] == times["prefill_ms_plain"] / times["prefill_ms"]
    assert all(math.isfinite(value) and value > 0 for value in times.values())
    assert data["overlay"] == str(picture)
    assert Image.open(picture).width > 4 * 300


@pytest.mark.usefixtures("quick")
def test_keeping_everything_answers_as_plain(
    scene: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = found(capsys, scene, QUESTION, "--model", checkpoint, "--layers", "3,9", "--keep", "1")
    assert data["answer_pruned"] == data["answer_plain"] != ""
    assert data["average_tokens"] == 144
    assert data["flops"] == data["flops_plain"]


@pytest.mark.usefixtures("quick")
def test_options_reach_the_patch(
    scene: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (scene, QUESTION, "--model", checkpoint, "--method", "fastv")
    data = found(capsys, *argv, "--layers", "2,8", "--keep", "0.5,0.25", "--dtype", "bfloat16")
    assert [row["tokens_kept"] for row in data["layers"]] == [72, 18]
    assert data["dtype"] == "bfloat16"
    assert data["layers"][0]["thresholds"] == {}
    data = found(capsys, *argv, "--layers", "2", "--target-tokens", "25")
    assert data["average_tokens"] == pytest.approx(25, abs=1)


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_the_seed_draws_other_tokens(
    scene: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = []
    for seed in (0, 0, 1):
        path = tmp_path / "drawn.png"
        options = ("--method", "random", "--seed", seed, "--overlay", path)
        found(capsys, scene, QUESTION, "--model", checkpoint, *options)
        pictures.append(Image.open(path).convert("RGB").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.usefixtures("quick")
def test_an_adapter_brings_its_settings(
    scene: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    atp_patch.patch_model(model, method="uniform", layers=[5], keep=0.5)
    atp_patch.save_pretrained(model, tmp_path / "adapter")
    data = found(capsys, scene, QUESTION, "--model", checkpoint, "--weights", tmp_path / "adapter")
    assert data["method"] == "uniform"
    assert data["layers"] == [{"layer": 5, "tokens_in": 144, "tokens_kept": 72, "thresholds": {}}]


@pytest.mark.parametrize("method", ["prumerge+", "downsample"])
def test_before_the_decoder_all_tokens_come_in(
    method: str, scene: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    argv = (scene, QUESTION, "--model", checkpoint)
    data = found(capsys, *argv, "--method", method, "--keep", "0.25")
    (row,) = data["layers"]
    assert (row["layer"], row["tokens_in"]) == (0, 144)
    assert row["tokens_kept"] == data["tokens_per_layer"][0] == 36


def test_people_get_tables(
    scene: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["demo", str(scene), "Is [b]this[/b] red?", "--model", str(checkpoint)]
    assert cli([*argv, "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    for part in ("plain answer", "pruned answer", "redundant", "GFLOPs", "cache", "5 runs of each"):
        assert part in out
    assert "Is [b]this[/b] red?" in out
    assert "Loading" in err


@pytest.mark.parametrize(
    ("argv", "status", "stream", "text"),
    [
        (["--help"], 0, "out", "demo"),
        (["--version"], 0, "out", atp_patch.__version__),
        ([], 2, "err", "no command given"),
        (["dance"], 2, "err", "known are: demo, "),
    ],
)
def test_console_script(
    argv: list[str], status: int, stream: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(argv) == status
    assert text in getattr(capsys.readouterr(), stream)
