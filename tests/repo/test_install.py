"""`.ci/install-torch` asks for a CPU build where there is no NVIDIA GPU, in the right order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA wheels are Linux's alone")


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


def test_a_gpu_gets_the_default_build(tmp_path: Path) -> None:
    assert calls(tmp_path, gpu=True) == [PIN]


def test_what_pip_is_set_up_with_comes_first(tmp_path: Path) -> None:
    assert calls(tmp_path) == [f"{PIN}+cpu"]


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


def test_the_fallback_says_what_it_does(tmp_path: Path) -> None:
    *asked, first, second = calls(tmp_path, refusals=2)
    assert len(asked) == 3
    assert "--index-url https://download.pytorch.org/whl/cpu" in asked[1]
    assert asked[2] == PIN
    assert "TORCH_INDEX" in first
    assert "CUDA" in second


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


def test_the_script_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert os.access(ROOT / ".ci" / "install-torch", os.X_OK)
