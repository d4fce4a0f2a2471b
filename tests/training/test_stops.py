"""What a training does not begin with, does not keep, and does not go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.tools.parameter_groups import add_lora
from atp_patch.training import command, trainer
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model
from tests.training.runs import history, run


def test_a_checkpoint_that_was_broken_off_is_passed_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "torn"
    run(folder, out)
    steps = len(history(out))
    torn = out / "checkpoint-4"  # all but what is written last
    (torn / "trainer_state.json").unlink()
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
