"""Versions that the tests do not run on are named when a model is patched, once each."""

from __future__ import annotations

import configparser
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import atp_patch
from atp_patch.patching import versions
from tests.helpers.run import FASTV
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def seen(model: Any) -> list[str]:
    """The warnings of patching and of patching once more."""
    vars(versions).pop("__warningregistry__", None)  # what this process has been told already
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        atp_patch.patch_model(model, **FASTV)
        atp_patch.patch_model(model, **FASTV)
        atp_patch.unpatch_model(model)
    return [
        str(one.message)
        for one in found
        if issubclass(one.category, atp_patch.UnsupportedVersionWarning)
    ]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that other versions are installed; those that are not named are tested ones."""

    def pretend(**names: str) -> None:
        newest = {name: found for name, (_, found) in versions.TESTED.items()} | names
        monkeypatch.setattr(platform, "python_version", lambda: newest["Python"])
        monkeypatch.setattr(torch, "__version__", newest["torch"])
        monkeypatch.setattr(transformers, "__version__", newest["transformers"])

    return pretend


def test_what_is_outside_warns_once_by_name(installed: Any) -> None:
    model = tiny_model("llava-llama")
    installed(torch="2.3.1", transformers="5.99.0.dev0", Python="4.0.1")
    python, older, newer = seen(model)
    assert python.startswith("Python 4.0.1 is newer than the versions that atp_patch is tested")
    assert older.startswith("torch 2.3.1 is older than the versions that atp_patch is tested with")
    assert newer.startswith("transformers 5.99.0.dev0 is newer")


def test_what_is_inside_does_not_warn(installed: Any) -> None:
    model = tiny_model("llava-llama")
    for at in (0, 1):
        installed(**{name: f"{found[at]}.9+cpu" for name, found in versions.TESTED.items()})
        assert not seen(model)


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
