"""The programs in results/: every command they would run is one that its program takes."""

from __future__ import annotations

import json
import os
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from atp_patch.bench.options import check_mode
from atp_patch.bench.options import parser as bench_parser
from atp_patch.evaluation.options import parser as evaluation_parser
from atp_patch.evaluation.settings import plan
from atp_patch.families import scaled_layers
from atp_patch.methods import METHODS
from atp_patch.tools.arguments import named_values
from atp_patch.training.options import flags_of
from atp_patch.training.options import parser as training_parser
from atp_patch.training.settings import read_settings
from workshop import train_compressed

ROOT = Path(__file__).resolve().parents[2]
DEPTH = {"builtin": 32, "builtin-dynamic": 8}
# Notes what it is told, and leaves what a training leaves.
STUB = """
import json, os, pathlib, sys
argv = sys.argv[1:]
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(argv) + "\\n")
if "atp_patch.evaluate" not in argv and "--out" in argv:
    adapter = pathlib.Path(argv[argv.index("--out") + 1]) / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "atp_config.json").write_text("{}")
    (adapter / "atp_model.safetensors").write_bytes(b"")
"""


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[list[str]]:
    """The arguments of every command of a program, in their order."""
    folder = tmp_path_factory.mktemp("recipes")
    stub = folder / "python"
    stub.write_text(f"#!{sys.executable}\n{STUB}", encoding="utf-8")
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    places = {"PYTHON": stub, "LOG": folder / "log", "OUT": folder / "out", "WORK": folder / "work"}
    places["OUT"].mkdir()
    told = {name: str(path) for name, path in places.items()}
    program, *parts = request.param.split()
    environment = {**os.environ, **told}
    subprocess.run([str(ROOT / "results" / program), *parts], check=True, env=environment)
    return [json.loads(line) for line in places["LOG"].read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "told", ["run.sh", "run.sh bench budgets", "train.sh", "gpu.sh"], indirect=True
)
def test_every_command_is_one_that_its_program_takes(told: list[list[str]]) -> None:
    assert len(told) >= 4
    for argv in told:
        if argv[:2] == ["-m", "atp_patch.evaluate"]:
            args = evaluation_parser().parse_args(argv[2:])
            settings = plan(
                args.methods,
                args.budgets,
                args.seeds,
                named_values(args.option),
                args.layers or scaled_layers(DEPTH[args.model]),
                args.adapters,
            )
            assert len(settings) > 4
        elif argv[:2] == ["-m", "atp_patch.train"]:
            args = training_parser().parse_args(argv[2:])
            made = read_settings(args.file, flags_of(args))
            (atp,) = (method for method in METHODS if method.name == "atp")
            atp(thresholds="learned", **made.options)
            assert max(made.layers or ()) < DEPTH[made.model]
        elif argv[:2] == ["-m", "atp_patch.bench"]:
            check_mode(bench_parser().parse_args(argv[2:]))
        elif argv[:2] == ["-m", "workshop.train_compressed"]:
            train_compressed.parse(argv[2:])
        elif argv[0] == "-c":
            assert argv[1] == "import flash_attn"
        elif argv[0] == "results/prefill_profile.py":
            profile = runpy.run_path(str(ROOT / argv[0]))
            profile["parser"]().parse_args(argv[1:])
        else:
            assert (ROOT / "results" / argv[0]).is_file(), argv


@pytest.mark.parametrize("told", ["train.sh"], indirect=True)
def test_a_recipe_has_three_seeds_and_is_trained_once(told: list[list[str]]) -> None:
    trained = [argv for argv in told if "--out" in argv and "--seed" in argv]
    seeds: dict[str, list[str]] = {}
    for argv in trained:
        *_, kind, recipe, _ = Path(argv[argv.index("--out") + 1]).parts
        name = f"{kind}/{recipe}" if kind.startswith("compressed") else recipe
        seeds.setdefault(name, []).append(argv[argv.index("--seed") + 1])
    assert {"frozen15", "lora15", "frozen25", "lora25", "paper20"} <= seeds.keys()
    assert {"compressed/voco8", "compressed-dynamic/voco8"} <= seeds.keys()
    assert all(found == ["0", "1", "2"] for found in seeds.values()), seeds


@pytest.mark.slow
def test_a_profile_tells_the_patch_from_the_model(tmp_path: Path) -> None:
    profile = runpy.run_path(str(ROOT / "results" / "prefill_profile.py"))
    out = tmp_path / "profile.json"
    profile["main"](["tiny", "--device", "cpu", "--scale", "0.5", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["method"] == "atp"
    assert found["waits"] == []
    assert 0 < found["patch_share"] < 0.9
    assert any("topk" in name or "sort" in name for name in found["longest"])
