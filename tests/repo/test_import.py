"""Importing the package changes nothing, and the package says the same of itself everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import atp_patch

ROOT = Path(__file__).parents[2]

SNAPSHOT = """
import inspect, logging, sys, warnings
import torch
import transformers.cache_utils, transformers.masking_utils, transformers.modeling_utils
import transformers.generation.utils
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava
from transformers.models.qwen2_vl import modeling_qwen2_vl

def snapshot():
    modules = [m for name, m in sys.modules.items() if name.startswith("transformers.")]
    modules += [torch, torch.nn, torch.nn.functional, torch.nn.modules.module]
    seen = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            seen[module.__name__, name] = id(value)
            if inspect.isclass(value):
                for key, entry in list(vars(value).items()):
                    seen[module.__name__, name, key] = id(entry)
    seen["attention"] = sorted(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    seen["masks"] = sorted(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    seen["torch"] = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    seen["filters"] = list(warnings.filters)
    seen["loggers"] = [logging.getLogger().level, logging.getLogger("transformers").level]
    return seen

before = snapshot()
import atp_patch
after = snapshot()
# Modules loaded lazily for the first time are no change; what was there must be as it was.
changed = {k for k, v in before.items() if after.get(k) != v and "_cache" not in str(k[-1])}
print(sorted(map(str, changed)))
"""


def test_importing_the_package_changes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_installed_version_is_the_package_s() -> None:
    try:
        installed = version("atp-patch")
    except PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == atp_patch.__version__


def table(title: str) -> list[str]:
    """First cells of the table under a heading of the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    return rows[1:]


def test_the_readme_names_what_there_is() -> None:
    named = set(re.findall(r"`(\w+)\(", " ".join(table("In a program"))))
    assert named <= set(atp_patch.__all__)
    functions = {n for n in atp_patch.__all__ if n[0].islower() and n != "__version__"}
    assert functions <= named
    assert [cell.strip("`") for cell in table("Methods")] == atp_patch.available_methods()
    assert {c.strip("`") for c in table("Models") if c[0] == "`"} == set(
        atp_patch.supported_families()
    )


def test_every_public_name_is_there() -> None:
    assert all(hasattr(atp_patch, name) for name in atp_patch.__all__)
