"""What a training does not begin with, does not keep, and does not go on from."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import atp_patch
from atp_patch import train
from atp_patch.tools.parameter_groups import add_lora
from atp_patch.training import command, trainer
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model
from tests.training.conftest import record
from tests.training.runs import LAYERS, heads, history, run


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file in a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    """A short training of the small model as a command."""
    layers = ",".join(map(str, LAYERS))
    given = (
        f"--layers {layers} --target-tokens 12 --samples 8 --steps 2 --batch-size 4 --calibrate 0"
    )
    given += " --device cpu --log-every 1 --save-every 1 --option reference_grid=6"
    return ["--model", str(folder), "--out", str(out), *given.split(), *more]


def complaint(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The last line of a training that is refused, or ends early; nothing but progress before."""
    capsys.readouterr()
    assert train.main(argv) == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("step ", "Loading ")) for line in progress), progress
    assert last.startswith("python -m atp_patch.train: ")
    return last


def test_a_finished_training_is_left_as_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train.main(flags(folder, out)) == 0
    before = contents(out)
    for more in ([], ["--calibrate", "8"], ["--keep", "1"]):
        assert "finished" in complaint(capsys, flags(folder, out, "--resume", *more))
        assert contents(out) == before


def test_a_training_whose_last_save_broke_off_is_only_saved(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert train.main(flags(folder, whole, "--lora-rank", "2")) == 0
    card = atp_patch.patching.adapter.Adapter.card

    def full(self: Any, folder: str) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "card")

    monkeypatch.setattr(atp_patch.patching.adapter.Adapter, "card", full)
    argv = flags(folder, out, "--lora-rank", "2")
    assert "No space left on device" in complaint(capsys, argv)
    assert not (out / "adapter").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(atp_patch.patching.adapter.Adapter, "card", card)
    capsys.readouterr()
    assert train.main([*argv, "--resume"]) == 0
    assert "step" not in capsys.readouterr().err
    for name, tensor in heads(whole / "adapter").items():
        assert torch.equal(tensor, heads(out / "adapter")[name])
    assert [len(history(path)) for path in (out, whole)] == [2, 2]
    lora = (path / "lora" / "adapter_model.safetensors" for path in (out, whole))
    assert len({path.read_bytes() for path in lora}) == 1


def test_a_full_disk_ends_a_training_with_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, save = tmp_path / "out", trainer.save_file
    errors = iter(
        [
            OSError(errno.ENOSPC, "No space left on device"),
            SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        ]
    )

    def full(tensors: Any, file: Path, **kwargs: Any) -> None:
        if file.parent.name == "checkpoint-2":
            file.write_bytes(b"half of")
            raise next(errors)
        save(tensors, file, **kwargs)

    monkeypatch.setattr(trainer, "save_file", full)
    assert "No space left on device" in complaint(capsys, flags(folder, out))
    first = contents(out / "checkpoint-1")
    assert first
    assert "make room" in complaint(capsys, flags(folder, out, "--resume"))
    assert contents(out / "checkpoint-1") == first
    monkeypatch.setattr(trainer, "save_file", save)
    assert train.main(flags(folder, out, "--resume")) == 0
    assert [line["step"] for line in history(out)] == [1, 2]


def test_settings_of_an_earlier_run_outlive_a_full_disk(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert train.main(flags(folder, out)) == 0
    shutil.rmtree(out / "adapter")
    before = (out / "settings.json").read_bytes()
    write = Path.write_text

    def full(self: Path, text: str, **kwargs: Any) -> int:
        if self.suffix == ".json":
            write(self, text[:20], **kwargs)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in complaint(capsys, flags(folder, out, "--resume", "--keep", "3"))
    assert (out / "settings.json").read_bytes() == before


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>" + question}, {"from": "gpt", "value": "yes"}]


DEEP = "[" * 100_000 + "]" * 100_000
FILES = {
    "deep.yaml": "options: {slope: " + DEEP + "}",
    "flow.yaml": "x: " + "{a: " * 3_000 + "1" + "}" * 3_000,
    "date.yaml": "steps: 2020-13-45",
    "digits.yaml": "steps: " + "9" * 5_000,
    "keys.yaml": "1: 2\nspeed: 3",
    "circle.yaml": "options: &a {slope: *a}",
    "nul.yaml": 'images: "a\\0b"',
    "half.yaml": 'model: "a\\ud800b"',
    "deep.json": DEEP,
    "digits.json": "[" + "9" * 5_000 + "]",
    "deep.jsonl": DEEP,
    "digits.jsonl": "9" * 5_000,
    "half.json": json.dumps([record(conversations=turns("\ud800 what?"))]),
    "speaker.json": json.dumps([record(conversations=[{"from": [1], "value": "?"}] * 2)]),
    "long.json": json.dumps([record(image="a" * 5_000 + ".png")]),
    "nul.json": json.dumps([record(image="a\0.png")]),
    "half-name.json": json.dumps([record(image="\ud800.png")]),
}


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["{}/deep.yaml"], ["deep.yaml", "nested too deeply"]),
        (["{}/flow.yaml"], ["flow.yaml", "nested too deeply"]),
        (["{}/date.yaml"], ["date.yaml", "not YAML"]),
        (["{}/digits.yaml"], ["digits.yaml", "not YAML"]),
        (["{}/keys.yaml"], ["keys.yaml", "no setting 1, 'speed'"]),
        (["{}/circle.yaml"], ["options: slope", "plain value"]),
        (["{}/nul.yaml"], ["images", "no text"]),
        (["{}/half.yaml"], ["model", "no text"]),
        (["--data", "{}/deep.json"], ["deep.json", "nested too deeply"]),
        (["--data", "{}/digits.json"], ["digits.json", "not JSON"]),
        (["--data", "{}/deep.jsonl"], ["sample 0", "nested too deeply"]),
        (["--data", "{}/digits.jsonl"], ["sample 0", "not JSON"]),
        (["--data", "{}/half.json"], ["sample 0", "half of a character"]),
        (["--data", "{}/speaker.json"], ["sample 0", '"from"']),
        (["--data", "{}/long.json"], ["sample 0", "File name too long"]),
        (["--data", "{}/nul.json"], ["sample 0", "no image"]),
        (["--data", "{}/half-name.json"], ["sample 0", "no image"]),
        (["--data", "a\0b.json"], ["an argument", "no text"]),
        (["--data", "a" * 5_000], ["File name too long"]),
        (["--images", "a\0b"], ["an argument", "no text"]),
        (["--model", "a\0b"], ["an argument", "no text"]),
        (["--model", "a\ud800b"], ["an argument", "no text"]),
        (["--model", "a" * 5_000], ["File name too long"]),
        (["--adapter", "a\0b"], ["an argument", "no text"]),
        (["a\0b.yaml"], ["an argument", "no text"]),
        (["--out", "a\0b"], ["an argument", "no text"]),
        (["--out", "{}/deep.json/out"], ["out: ", "deep.json is a file", "give a folder"]),
        (["--out", "{}/deep.json"], ["out: ", "deep.json is a file", "give a folder"]),
        (["--out", "{}/" + "a" * 5_000], ["File name too long"]),
        (["--option", "slope=" + DEEP], ["slope"]),
        (["--option", "slope=" + "9" * 5_000], ["slope"]),
    ],
)
def test_what_a_training_does_not_begin_with(
    argv: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = contents(tmp_path)
    given = ["--out", str(tmp_path / "out"), *(arg.replace("{}", str(tmp_path)) for arg in argv)]
    given += ["--steps", "1"]
    line = complaint(capsys, given)
    assert all(part in line for part in parts), line[:500]
    assert contents(tmp_path) == before


def test_a_checkpoint_that_was_broken_off_is_passed_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "torn"
    run(folder, out)
    steps = len(history(out))
    torn = out / "checkpoint-4"  # all but what is written last
    (torn / "trainer_state.json").unlink()
    shutil.rmtree(out / "adapter")
    run(folder, out, resume=True)
    assert (torn / "trainer_state.json").is_file(), "it did not go on from checkpoint-2"
    assert len(history(out)) == steps


def test_weights_behind_a_loss_that_is_no_number_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.PruningTrainer.training_step

    def broken(self: Any, model: Any, *args: Any) -> Any:
        if self.state.global_step == 1:
            with torch.no_grad():
                next(model.atp_patch_heads.parameters()).fill_(torch.nan)
        return step(self, model, *args)

    monkeypatch.setattr(trainer.PruningTrainer, "training_step", broken)
    with pytest.raises(atp_patch.ATPError, match="lower lr or atp_lr, in another out"):
        run(folder, tmp_path / "nan", save_every=50)
    assert not list((tmp_path / "nan").glob("checkpoint-*"))


def test_text_alone_needs_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = command.arguments

    def several(*given: Any) -> Any:
        args = made(*given)
        monkeypatch.setattr(type(args), "world_size", 2)
        return args

    monkeypatch.setattr(command, "arguments", several)
    with pytest.raises(atp_patch.ConfigError, match="train in one process"):
        run(folder, tmp_path, text_only=True, freeze_lm=False)


def test_lora_is_float32_whatever_the_model_is() -> None:
    pytest.importorskip("peft")
    model = tiny_model("llava-llama").to(torch.bfloat16)
    atp_patch.patch_model(model, [2], thresholds="learned")
    add_lora(model, 2, 4.0)
    dtypes = {
        name.split(".")[-3]: p.dtype for name, p in model.named_parameters() if "lora" in name
    }
    assert dtypes == {"lora_A": torch.float32, "lora_B": torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        model(**made.batch(model, made.SINGLE))
