"""What is refused before a training with DeepSpeed; tests/training/test_parallel.py trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import atp_patch
from atp_patch import train
from atp_patch.contract.errors import ConfigError, WeightsError
from atp_patch.training.zero3 import check_deepspeed
from tests.core.test_learning import learner


def arguments(world_size: int, **zero: Any) -> Any:
    """Of transformers' Trainer, as far as they are looked at."""
    config = SimpleNamespace(config={"zero_optimization": zero})
    plugin = SimpleNamespace(hf_ds_config=config)
    return SimpleNamespace(world_size=world_size, deepspeed_plugin=plugin)


def test_no_launcher(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert train.main(["--deepspeed", "examples/zero3.json"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_processes_that_accelerate_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"1 of 2 processes.*leave deepspeed out"):
        check_deepspeed(arguments(1, stage=2))
    check_deepspeed(arguments(2, stage=2))


def test_parts_that_would_not_be_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    name = "stage3_gather_16bit_weights_on_model_save"
    with pytest.raises(ConfigError, match=name):
        check_deepspeed(arguments(2, stage=3))
    check_deepspeed(arguments(2, stage=3, **{name: True}))


def test_parts_are_not_saved(tmp_path: Any) -> None:
    """Between its uses ZeRO-3 leaves an empty tensor of a parameter, and its size."""
    model = learner("llava-llama")
    parameter = next(model.atp_patch_heads.parameters())
    parameter.ds_numel, parameter.data = parameter.numel(), parameter.data.new_empty(0)
    with pytest.raises(WeightsError, match=r"state_dict=state"):
        atp_patch.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
