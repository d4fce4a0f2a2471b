"""Two processes learn what one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

import atp_patch
from atp_patch.training.dataset import Samples, collate
from atp_patch.training.encode import Encoder
from atp_patch.training.records import LlavaFile
from tests.training.conftest import Writer, record
from tests.training.runs import heads, history, plain

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("parallel.py")
ON_CPUS = Path(__file__).with_name("deepspeed_on_cpus.py")
NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs DeepSpeed (pip install '.[deepspeed]') and g++, which builds its collectives",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without processes"),
]


def started(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """A process of its own, without the variables by which launchers name processes."""
    launchers = {"LOCAL_RANK", "RANK", "WORLD_SIZE"}
    env = {name: value for name, value in os.environ.items() if name not in launchers}
    bins = Path(sys.executable).parent  # where DeepSpeed looks for ninja
    env |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(bins), os.environ.get("PATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=env)


def run(argv: list[str]) -> None:
    """As :func:`started`, and it must end well."""
    done = started(argv)
    assert done.returncode == 0, done.stderr[-3000:]


def trained(kind: str, learns: str, out: Path) -> dict[str, Any]:
    launch = [sys.executable]
    if kind != "one":
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run([*launch, str(SCRIPT), kind, learns, str(out)])
    return torch.load(out, weights_only=True)


def test_the_command_in_two_processes(folder: Path, tmp_path: Path, data: Writer) -> None:
    """As alone: the same batches, the same losses, one adapter."""
    file = data([record(), record(image="other.png")] * 4)
    flags = ["--model", folder, "--data", file, "--layers", "2,4,6", "--target-tokens", 12]
    flags += ["--batch-size", 4, "--steps", 2, "--log-every", 1, "--device", "cpu"]
    flags += ["--atp-lr", 1e-2, "--option", "lambda_target=0", "--lora-rank", 2, "--lr", 1e-3]
    # Of a model whose scores are close to each other, rounding decides which shift is the nearest.
    flags += ["--calibrate", 0]
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes), "-m", "atp_patch.train"]
        run([*launch, *map(str, flags), "--out", str(out)])
        found.append((heads(out / "adapter"), [line["loss"] for line in history(out)]))
    (one, losses), (two, other) = found
    assert other == pytest.approx(losses, rel=1e-3)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What one process learns."""
    folder = tmp_path_factory.mktemp("one")
    return cache(lambda learns: trained("one", learns, folder / learns))


@pytest.mark.parametrize("learns", ["heads", "decoder"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_two_processes_are_one(kind: str, learns: str, alone: Any, tmp_path: Path) -> None:
    one, two = alone(learns), trained(kind, learns, tmp_path / kind)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(set(one["losses"])) == len(one["losses"])
    assert set(two["learned"]) == set(one["learned"])
    for name, tensor in one["learned"].items():
        torch.testing.assert_close(two["learned"][name], tensor, rtol=1e-4, atol=1e-5)
    for name, tensor in heads(tmp_path / f"{kind}.adapter").items():
        torch.testing.assert_close(tensor, two["learned"][f"atp_patch_heads.{name}"])


@NEEDS_DEEPSPEED
@pytest.mark.timeout(900)
def test_the_command_with_zero3(folder: Path, tmp_path: Path, data: Writer) -> None:
    """As alone, with LoRA, from a checkpoint on, and calibrated."""
    file = data([record(), record(image="other.png")] * 4)
    flags = ["--model", folder, "--data", file, "--layers", "2,4,6", "--target-tokens", 12]
    flags += ["--batch-size", 4, "--steps", 2, "--log-every", 1, "--save-every", 1]
    flags += ["--atp-lr", 1e-2, "--lora-rank", 2, "--lr", 1e-3, "--option", "lambda_target=0"]
    flags += ["--option", "score_norm=rank", "--option", "spatial_order=progressive"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = ["-m", "atp_patch.train", *flags, "--device", "cpu", "--calibrate", 0, "--out", one]
    run([sys.executable, *map(str, alone)])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ON_CPUS]
    launch += [*flags, "--calibrate", 8, "--deepspeed", ROOT / "examples" / "zero3.json"]
    run([sys.executable, *map(str, launch), "--out", str(two)])
    shutil.rmtree(two / "checkpoint-2")
    shutil.rmtree(two / "adapter")
    run([sys.executable, *map(str, launch), "--out", str(two), "--resume"])

    losses, other = ([line["loss"] for line in history(out)] for out in (one, two))
    assert other == pytest.approx(losses, rel=1e-4)
    for part in ("adapter/atp_model", "lora/adapter_model"):
        first, second = (load_file(out / f"{part}.safetensors") for out in (one, two))
        assert set(first) == set(second)
        for name, tensor in first.items():
            if not name.endswith("bias") or "theta" not in name:  # which calibration shifts
                torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)
    model = plain(folder)
    model.load_adapter(str(two / "lora"))
    atp_patch.patch_model(model, weights=two / "adapter")
    encode = Encoder(AutoProcessor.from_pretrained(folder), [4], None)
    samples = Samples(LlavaFile(file, tmp_path, max_image_pixels=10**6), encode, False)
    kept = []
    for i in range(len(samples)):
        with torch.no_grad():
            model(**collate([samples[i]], pad_id=0))
        kept.append(atp_patch.last_trace(model).average_tokens)
    assert sum(kept) / len(kept) == pytest.approx(12, rel=0.02)


@NEEDS_DEEPSPEED
def test_zero3_that_cannot_be_saved_is_refused(folder: Path, tmp_path: Path) -> None:
    """Before the training, which would be lost."""
    given = json.loads((ROOT / "examples" / "zero3.json").read_text(encoding="utf-8"))
    del given["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    (tmp_path / "zero3.json").write_text(json.dumps(given), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    flags = ["--model", str(folder), "--deepspeed", str(tmp_path / "zero3.json")]
    refused = started([*launch, "1", "-m", "atp_patch.train", *flags])
    assert "atp_patch.train: deepspeed: what ZeRO-3 has learned" in refused.stderr


@NEEDS_DEEPSPEED
def test_processes_that_accelerate_does_not_see_are_refused(folder: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    flags = ["--model", str(folder), "--deepspeed", str(ROOT / "examples" / "zero3.json")]
    refused = started([*launch, "2", "-m", "atp_patch.train", *flags])
    assert "Accelerate sees 1 of 2 processes" in refused.stderr
