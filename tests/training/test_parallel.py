"""Two processes learn what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import Writer, record
from tests.training.runs import heads, history

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("parallel.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without processes"),
]


def run(argv: list[str]) -> None:
    """A process of its own, which must end well."""
    paths = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, **paths}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
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


@pytest.mark.parametrize("learns", ["heads", "decoder"])
def test_two_processes_are_one(learns: str, tmp_path: Path) -> None:
    one = trained("one", learns, tmp_path / "one")
    for kind in ("ddp", "fsdp2"):
        two = trained(kind, learns, tmp_path / kind)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert set(two["learned"]) == set(one["learned"])
        for name, tensor in one["learned"].items():
            torch.testing.assert_close(two["learned"][name], tensor, rtol=1e-4, atol=1e-5)
    moved = one["losses"]
    assert len(set(moved)) == len(moved)
