"""The command end to end: adapters, other tokenizers, the record of what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.evaluation import command, runner
from tests.evaluation.conftest import TOKENS, build

ASKED = "--methods uniform --budgets 0.5 --tasks exist --questions 6 --seeds 1 --split development"


def rows(model: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """The rows of the summary of a run."""
    argv = ["--model", str(model), *ASKED.split(), "--no-plots", "--out", str(out), *more]
    assert command.main(argv) == 0
    lines = (out / command.SUMMARY).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_an_adapter_decides_by_itself(folder: Path, tmp_path: Path) -> None:
    model, _ = build()
    atp_patch.patch_model(model, [1, 5], "atp", thresholds="learned", target_tokens=12)
    atp_patch.save_pretrained(model, tmp_path / "heads")
    found = rows(folder, tmp_path / "out", "--adapters", str(tmp_path / "heads"))
    row = next(row for row in found if row["method"] == "adapter heads")
    assert row["adapter_hash"]
    assert row["budget"] is None
    assert row["layers"] == [1, 5]
    assert 0 < row["average_tokens"] < TOKENS
    table = (tmp_path / "out" / command.TABLE).read_text(encoding="utf-8")
    assert "| adapter heads | 1+5 | its own |" in table


def test_an_adapters_controls_keep_as_many(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CONTROL_QUESTIONS", 24)
    model, _ = build()
    torch.manual_seed(0)
    atp_patch.patch_model(model, [1, 5], "atp", thresholds="learned", target_tokens=12)
    for name, parameter in model.atp_patch_heads.named_parameters():
        if "theta" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    heads = tmp_path / "heads"
    atp_patch.save_pretrained(model, heads)
    named = f"{heads},{heads}~mean,{heads}~shuffled"
    asked = rows(folder, tmp_path / "out", "--adapters", named, "--questions", "24")
    found = {row["method"]: row for row in asked}
    own, mean, shuffled = (found[f"adapter heads{end}"] for end in ("", "~mean", "~shuffled"))
    assert "control" not in own
    assert (mean["control"], shuffled["control"]) == ("mean", "shuffled")
    assert mean["average_tokens"] == pytest.approx(own["average_tokens"], rel=0.1)
    assert shuffled["average_tokens"] == pytest.approx(own["average_tokens"], rel=0.1)
    assert len({row["average_tokens"] for row in (own, mean, shuffled)}) == 3


def test_several_trainings_are_pooled(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "CONTROL_QUESTIONS", 4)  # how well controls match plays no part
    model, _ = build()
    for number, layers in enumerate(([1, 5], [1, 5], [2, 5])):
        torch.manual_seed(number)
        atp_patch.patch_model(model, layers, "atp", thresholds="learned", target_tokens=12)
        for parameter in model.atp_patch_heads.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
        parent = tmp_path / ("alike" if layers == [1, 5] else "other")
        atp_patch.save_pretrained(model, parent / str(number) / "adapter")
        atp_patch.unpatch_model(model)
    alike = tmp_path / "alike"
    named = f"{alike},{alike}~mean,{alike / '0'},{alike / '1'}"
    found = {r["method"]: r for r in rows(folder, tmp_path / "out", "--adapters", named)}
    pooled, first, second = (found[f"adapter {name}"] for name in ("alike", "0", "1"))
    assert pooled["seeds"] == [0, 1]
    assert found["adapter alike~mean"]["seeds"] == [0, 1]
    means = [first["mean_accuracy"][0], second["mean_accuracy"][0]]
    assert pooled["accuracy_by_seed"] == means
    assert pooled["average_tokens"] == pytest.approx(
        (first["average_tokens"] + second["average_tokens"]) / 2
    )
    assert first["average_tokens"] != second["average_tokens"]
    table = (tmp_path / "out" / command.TABLE).read_text(encoding="utf-8")
    assert "| adapter alike (2 trainings) | 1+5 |" in table
    (tmp_path / "other" / "2").rename(alike / "2")
    argv = ["--model", str(folder), *ASKED.split(), "--no-plots", "--out", str(tmp_path / "o")]
    assert command.main([*argv, "--adapters", str(alike)]) == 2
    assert "before different layers ((1, 5), (2, 5))" in capsys.readouterr().err


def test_answers_are_generated_where_words_are_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = rows(folder, tmp_path / "forced")
    monkeypatch.setattr(command, "word_ids", dict)
    generated = rows(folder, tmp_path / "generated", "--max-new-tokens", "4")
    assert {row["answers"] for row in forced} == {"forced"}
    assert {row["answers"] for row in generated} == {"generate"}
    assert [row["accuracy"] for row in forced] == [row["accuracy"] for row in generated]


def test_an_interrupt_is_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", stop)
    argv = ["--model", str(folder), *ASKED.split(), "--no-plots", "--out", str(tmp_path)]
    assert command.main(argv) == 130
    assert "goes on from here" in capsys.readouterr().err
