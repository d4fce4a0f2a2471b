"""The main job on real input: the built-in model, the shipped scenes, a quarter of the tokens."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import atp_patch
from atp_patch.builtin import load_builtin
from atp_patch.commands import demo
from atp_patch.tools.loading import encode
from atp_patch.tools.parameter_groups import add_lora

ROOT = Path(__file__).parents[2]
SCENES = ROOT / "examples" / "scenes"
QUESTION = "How many red shapes are there?"


def shipped() -> list[tuple[Path, str, str]]:
    """Image, question and true answer of every question that ships."""
    scenes = json.loads((SCENES / "scenes.json").read_text(encoding="utf-8"))["scenes"]
    return [
        (SCENES / scene["file"], asked["question"], asked["answer"])
        for scene in scenes
        for asked in scene["questions"]
    ]


def made() -> tuple[Path, str]:
    """Image and true answer of what ``make demo`` asks."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    image, question = re.findall(r"^(?:IMAGE|QUESTION) +\?= (.+)$", makefile, re.MULTILINE)
    assert question == QUESTION
    return next((p, a) for p, q, a in shipped() if (p, q) == (ROOT / image, question))


def test_make_demo_answers_truly_on_a_quarter_of_the_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "RUNS", 1)
    image, true_answer = made()
    assert true_answer != "0"
    capsys.readouterr()
    assert demo.main([str(image), QUESTION, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    data = json.loads(out)
    assert data["answer_plain"] == data["answer_pruned"] == true_answer
    assert data["average_tokens"] == pytest.approx(data["visual_tokens"] / 4, abs=1)
    assert "generated scenes only" in data["note"]


def test_people_are_told_what_the_model_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "RUNS", 1)
    assert demo.main([str(SCENES / "02.png"), QUESTION, "--method", "uniform"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the built-in model" in out
    assert "generated scenes only" in out


@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_shipped_scenes_have_true_answers_and_pruning_keeps_most(step: int) -> None:
    """The plain model is right on most questions, and loses little at a quarter of the tokens."""
    assert len({path for path, _, _ in shipped()}) >= 10
    model, processor = load_builtin()
    atp_patch.patch_model(model, layers=[4, 14, 24])
    right = {"plain": 0, "pruned": 0}
    questions = shipped()[::step]
    for path, question, answer in questions:
        inputs = encode(processor, Image.open(path).convert("RGB"), question, model)
        with atp_patch.disabled(model):
            right["plain"] += demo.answer(model, processor, inputs, 8)[0] == answer
        right["pruned"] += demo.answer(model, processor, inputs, 8)[0] == answer
    assert right["plain"] >= 0.85 * len(questions)
    assert right["pruned"] >= 0.75 * len(questions)


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    answer, summary = capsys.readouterr().out.splitlines()
    assert answer == made()[1]
    assert summary.startswith("576 visual tokens, 144 a layer")
    lines = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 25


@pytest.mark.slow
def test_lora_beside_an_adapter_speaks_in_the_pruned_answer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(demo, "RUNS", 1)
    model, _ = load_builtin()
    atp_patch.patch_model(model, [4], "uniform", keep=0.9)
    add_lora(model, rank=1, alpha=1.0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=9.0)  # it talks nonsense from now on
    atp_patch.save_pretrained(model, tmp_path / "adapter")
    atp_patch.unpatch_model(model)
    model.save_pretrained(tmp_path / "lora")
    image, true_answer = made()
    alone = shutil.copytree(tmp_path / "adapter", tmp_path / "alone")
    for source, same in ((alone, True), (tmp_path / "adapter", False)):
        argv = [str(image), QUESTION, "--json", "--max-new-tokens", "3"]
        assert demo.main([*argv, "--weights", str(source)]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["answer_plain"] == true_answer
        assert (data["answer_pruned"] == true_answer) == same
