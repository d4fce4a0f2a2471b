"""Methods by name: what it costs to look one up."""

from __future__ import annotations

from pathlib import Path

import pytest

import atp_patch
from atp_patch.methods import registry


def test_the_metadata_of_packages_is_read_once_for_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes milliseconds, where a patch takes less than one."""
    calls = []
    read = registry.entry_points
    monkeypatch.setattr(registry, "entry_points", lambda **group: calls.append(1) or read(**group))
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(3):
        assert registry.method_class("fastv").name == "fastv"
        assert "fastv" in atp_patch.available_methods()
    assert len(calls) == 1
    monkeypatch.syspath_prepend(tmp_path / "another")
    registry.method_class("fastv")
    assert len(calls) == 2
