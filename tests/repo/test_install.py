"""What is installed: a CPU build of torch where there is no NVIDIA GPU, and a small wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PIN = next(
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)
# Stands in for Python: notes each pip call and refuses the first $REFUSALS of them.
PYTHON = """#!/bin/sh
case "$2" in *"import torch"*) exit 1;; *"import sys"*) exit "${OLD:-0}";; esac
echo "$*" >> "$CALLS"
[ "$(grep -c . "$CALLS")" -gt "$REFUSALS" ] || exit 1
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA wheels are Linux's alone")


def calls(tmp_path: Path, *, gpu: bool = False, refusals: int = 0, index: str = "") -> list[str]:
    """What pip is asked for, and on stderr what the user is told, in order."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {"python": PYTHON} | ({"nvidia-smi": "#!/bin/sh\n"} if gpu else {})
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for tool in ("bash", "grep", "uname", "env"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    log = tmp_path / "calls"
    env = {"PATH": str(folder), "CALLS": str(log), "REFUSALS": str(refusals)}
    done = subprocess.run(
        [ROOT / ".ci" / "install-torch", folder / "python", ROOT / "constraints.txt"],
        env=env | ({"TORCH_INDEX": index} if index else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    asked = log.read_text().splitlines()
    return [line.split(" install --quiet ")[1] for line in asked] + done.stderr.splitlines()


@on_linux
def test_a_gpu_gets_the_default_build(tmp_path: Path) -> None:
    assert calls(tmp_path, gpu=True) == [PIN]


@on_linux
def test_what_pip_is_set_up_with_comes_first(tmp_path: Path) -> None:
    assert calls(tmp_path) == [f"{PIN}+cpu"]


@on_linux
@pytest.mark.parametrize(
    ("index", "asked_of"),
    [
        ("", "https://download.pytorch.org/whl/cpu"),
        ("https://wheels.example/cpu", "https://wheels.example/cpu"),
    ],
)
def test_then_the_index_of_cpu_builds(tmp_path: Path, index: str, asked_of: str) -> None:
    first, second = calls(tmp_path, refusals=1, index=index)
    assert first == f"{PIN}+cpu"
    assert second.endswith(f"--index-url {asked_of} {PIN}+cpu")


@on_linux
def test_the_fallback_says_what_it_does(tmp_path: Path) -> None:
    *asked, first, second = calls(tmp_path, refusals=2)
    assert len(asked) == 3
    assert "--index-url https://download.pytorch.org/whl/cpu" in asked[1]
    assert asked[2] == PIN
    assert "TORCH_INDEX" in first
    assert "CUDA" in second


@on_linux
def test_an_old_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci" / "install-torch", tmp_path / "python", ROOT / "constraints.txt"],
        env={**os.environ, "OLD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.10 or newer is needed")


@on_linux
def test_the_script_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert os.access(ROOT / ".ci" / "install-torch", os.X_OK)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files that it is made of."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("atp_patch", "workshop"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_is_small_and_holds_the_package_alone(wheel: Path) -> None:
    assert wheel.stat().st_size <= 20_000_000
    with ZipFile(wheel) as file:
        names = set(file.namelist())
    own = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in own} == {"atp_patch"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "atp_patch").rglob("*.py")}
    assert modules < own
    data = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "atp_patch").rglob("*.safetensors")
    }
    assert data < own


def test_what_the_wheel_holds_runs(wheel: Path, tmp_path: Path) -> None:
    """Unpacked away from the repository, so that a missing file is missed."""
    with ZipFile(wheel) as file:
        file.extractall(tmp_path)
    script = """
import atp_patch
from atp_patch.builtin import load_builtin
from atp_patch.tools.trained import shipped
assert atp_patch.__file__.startswith(FOLDER)
for name in shipped():
    model, _ = load_builtin()
    atp_patch.load_trained(model, name)
load_builtin("dynamic")
print(*shipped())
"""
    done = subprocess.run(
        [sys.executable, "-c", script.replace("FOLDER", repr(str(tmp_path)))],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["atp25", "voco8"]
