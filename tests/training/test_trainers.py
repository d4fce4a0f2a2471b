"""The examples of other people's trainers, and mixed precision."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

import atp_patch
from tests.core.test_learning import labelled, learner
from tests.helpers import inputs as made
from tests.training.runs import plain, question

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "trainers"


def arguments(folder: Path, out: Path) -> list[str]:
    """Two steps on the small model."""
    argv = ["--model", str(folder), "--layers", "2,4,6", "--target-tokens", "12"]
    return [*argv, "--steps", "2", "--batch-size", "2", "--out", str(out)]


def run_in_process(name: str, argv: list[str]) -> None:
    """Run an example here, on the CPU, as if its processes were the first of Accelerate."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [name, *argv])
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        finally:
            sys.modules.pop("scenes", None)
            AcceleratorState._reset_state(reset_partial_state=True)


def run_alone(name: str, argv: list[str], folder: Path) -> str:
    """What an example printed in a process of its own."""
    paths = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *argv],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "name", ["loop", "accelerate_loop", "trainer", pytest.param("trl_sft", marks=pytest.mark.slow)]
)
def test_the_examples_train_an_adapter(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(folder, tmp_path / "adapter")
    if name == "trl_sft":  # TRL changes transformers when it is imported
        pytest.importorskip("trl")
        said = run_alone(name, argv, tmp_path)
    else:
        run_in_process(name, argv)
        said = capsys.readouterr().out
    assert "loss" in said
    model = atp_patch.patch_model(plain(folder), weights=tmp_path / "adapter")
    start = plain(folder)
    torch.manual_seed(0)
    atp_patch.patch_model(start, [2, 4, 6], thresholds="learned", target_tokens=12)
    biases = {n: p for n, p in start.atp_patch_heads.named_parameters() if "theta" in n}
    learned = dict(model.atp_patch_heads.named_parameters())
    # Biases begin at the budget, whatever is drawn.
    assert all(not torch.equal(learned[n], p) for n, p in biases.items() if n.endswith("bias"))
    with torch.no_grad():
        model(**question(folder))
    assert 0 < atp_patch.last_trace(model).average_tokens <= 36


def test_a_trainer_that_makes_its_own_loss_is_told_how_not_to() -> None:
    """As TRL does: log-probabilities in place of logits, and a loss that nobody asks for."""
    model = learner("llava-llama").train()
    forward = model.forward

    def fused(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.log_probs = output.logits
        return output

    model.forward = fused
    with pytest.raises(atp_patch.UnsupportedModelError, match=r"Trainer\.compute_loss"):
        model(**labelled(model))


def test_bfloat16_autocast_learns_as_float32_does() -> None:
    """Same directions, and the heads' parameters stay float32."""
    gradients = []
    for half in (False, True):
        model = learner("llava-llama", target_tokens=14).train()
        inputs = labelled(model, made.SAME_SIZE)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(**inputs).loss
        loss.backward()
        assert loss.dtype == torch.float32 or half
        heads = [p for p in model.atp_patch_heads.parameters() if p.grad is not None]
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in heads)
        gradients.append(torch.cat([p.grad.flatten() for p in heads]))
    assert bool(torch.isfinite(gradients[1]).all())
    alike = torch.cosine_similarity(*gradients, dim=0)
    assert float(alike) > 0.9


def test_the_configurations_are_read_by_accelerate() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    kinds = {}
    for file in sorted((ROOT / "examples" / "accelerate").glob("*.yaml")):
        config = ClusterConfig.from_yaml_file(yaml_file=str(file))
        kinds[file.stem] = str(config.distributed_type).rpartition(".")[2]
        named = yaml.safe_load(file.read_text(encoding="utf-8"))
        json_file = named.get("deepspeed_config", {}).get("deepspeed_config_file")
        assert json_file is None or (ROOT / json_file).is_file()
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
