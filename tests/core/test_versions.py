"""Versions that the tests do not run on are named when a model is patched, once each."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atp_patch.patching import versions

ROOT = Path(__file__).resolve().parents[2]


OTHERS = """
import sys
import atp_patch
from atp_patch.patching import versions
from tests.helpers.run import FASTV
from tests.helpers.tiny import tiny_model

model = tiny_model("llava-llama")
versions.platform.python_version = lambda: sys.argv[1]
versions.torch.__version__, versions.transformers.__version__ = sys.argv[2:]
for _ in range(2):
    atp_patch.patch_model(model, **FASTV)
"""
OURS = "UnsupportedVersionWarning: "


def warned(python: str, torch: str, transformers: str) -> list[str]:
    """Return what a new process says that patches twice and believes in these versions."""
    command = [sys.executable, "-c", OTHERS, python, torch, transformers]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return [line.split(OURS)[1] for line in ran.stderr.splitlines() if OURS in line]


def test_what_is_outside_warns_once_by_name() -> None:
    python, older, newer = warned("4.0.1", "2.3.1", "5.99.0.dev0")
    assert python.startswith("Python 4.0.1 is newer than the versions that atp_patch is tested")
    assert older.startswith("torch 2.3.1 is older than the versions that atp_patch is tested with")
    assert newer.startswith("transformers 5.99.0.dev0 is newer")


@pytest.mark.parametrize("end", [0, 1])
def test_what_is_inside_does_not_warn(end: int) -> None:
    assert not warned(*(f"{versions.TESTED[name][end]}.9+cpu" for name in versions.TESTED))


def test_metadata_and_page_name_the_same_versions() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    options, page = setup["options"], (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^(\w+)>=([\d.]+)$", options["install_requires"], re.MULTILINE))
    asked["Python"] = options["python_requires"].removeprefix(">=")
    for name, (oldest, newest) in versions.TESTED.items():
        assert asked[name] == oldest
        assert f"| {name} | {oldest} | {newest} |" in page
    classifiers = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert (classifiers[0], classifiers[-1]) == versions.TESTED["Python"]
