"""LoRA beside an adapter: merged while measured, gone afterwards, part of what identifies a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import atp_patch
from atp_patch.errors import ConfigError, WeightsError
from atp_patch.evaluation.identity import model_hash
from atp_patch.evaluation.lora import merged
from atp_patch.evaluation.runner import Bench
from atp_patch.evaluation.settings import Setting, applied, plan
from atp_patch.training.learn import add_lora
from tests.evaluation.conftest import TOKENS, build

pytest.importorskip("peft")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What training leaves: an adapter and a LoRA that changes something."""
    model = atp_patch.patch_model(build()[0], [2], "fixed", keep=0.5)
    add_lora(model, rank=2, alpha=6.0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    atp_patch.save_pretrained(model, tmp_path / "adapter")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, tmp_path / "logits.pt")
    atp_patch.unpatch_model(model)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path


def settings(spec: str) -> list[Setting]:
    planned = plan([], [0.5], 1, {}, [2], [spec], 8)
    return [s for s in planned if s.adapter is not None]


def test_merged_is_what_peft_computes_and_nothing_is_left(bench: Bench, trained: Path) -> None:
    before = model_hash(bench.model)
    (setting,) = settings(str(trained))
    with applied(bench.model, setting, TOKENS), torch.no_grad():
        found = bench.model(input_ids=torch.arange(3, 12)[None]).logits
    expected = torch.load(trained / "logits.pt")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = bench.model(input_ids=torch.arange(3, 12)[None]).logits
    assert (plain - expected).abs().max() > 1e-3
    assert model_hash(bench.model) == before


def test_lora_is_part_of_the_identity(trained: Path) -> None:
    (with_lora,) = settings(str(trained))
    (alone,) = settings(str(trained / "adapter"))
    assert with_lora.lora is not None
    assert alone.lora is None
    assert with_lora.identity() != alone.identity()
    assert not any(str(trained) in str(v) for v in with_lora.identity().values())


def test_what_cannot_be_merged_is_named(bench: Bench, trained: Path) -> None:
    before = model_hash(bench.model)
    with pytest.raises(WeightsError, match="holds no LoRA"), merged(bench.model, str(trained)):
        pass
    layer = bench.model.get_decoder().layers[7].mlp
    layer.down_proj, kept = torch.nn.Linear(2, 3), layer.down_proj
    with (
        pytest.raises(WeightsError, match="made for another model"),
        merged(bench.model, str(trained / "lora")),
    ):
        pass
    layer.down_proj = kept
    assert model_hash(bench.model) == before
    (trained / "model").mkdir()
    with pytest.raises(ConfigError, match="give --model"):
        settings(str(trained))
