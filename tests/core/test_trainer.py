"""Trainers work on a patched model as they are: transformers' own, and a loop on Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer, TrainingArguments

import atp_patch
from tests.core.test_learning import labelled, learner
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model


def frozen(kind: str = "llava-llama") -> Any:
    """Only the heads learn."""
    model = learner(kind, target_tokens=14)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("atp_patch_heads" in name)
    return model


def samples(model: Any, count: int) -> list[dict[str, Tensor]]:
    prompts = [
        made.prompt(made.Words(3), made.Image(4, 6), made.Words(9), seed=s) for s in range(count)
    ]
    batches = [labelled(model, (prompt,)) for prompt in prompts]
    return [{name: tensor[0] for name, tensor in batch.items()} for batch in batches]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**settings, **changes})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    whole_model = frozen()
    start = {n: p.detach().clone() for n, p in whole_model.atp_patch_heads.named_parameters()}
    whole = Trainer(
        whole_model, arguments(tmp_path / "whole"), train_dataset=samples(whole_model, 16)
    )
    whole.train()
    assert len(losses(whole)) == 4
    moved = dict(whole_model.atp_patch_heads.named_parameters())
    assert any(not torch.equal(moved[name], start[name]) for name in start)

    resumed_model = frozen()
    resumed = Trainer(
        resumed_model, arguments(tmp_path / "resumed"), train_dataset=samples(resumed_model, 16)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)
    for name, parameter in resumed_model.atp_patch_heads.named_parameters():
        torch.testing.assert_close(parameter, moved[name])

    atp_patch.save_pretrained(whole_model, tmp_path / "adapter")
    again = atp_patch.patch_model(tiny_model("llava-llama"), weights=tmp_path / "adapter")
    batch = made.batch(again, made.MIXED)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, whole_model.eval()(**batch).logits)


def test_a_loop_on_accelerate(tmp_path: Path) -> None:
    model = frozen("qwen2_vl")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    heads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(heads, lr=1e-2))
    model.train()
    batches = [labelled(model, (prompt,)) for prompt in made.SAME_SIZE]
    before = [parameter.detach().clone() for parameter in heads]
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(before, heads, strict=True))
    assert set(atp_patch.last_trace(model).losses) == {"atp", "target"}
