"""Work that is killed and begun again; `make kills` does it many times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import kills
from tests.matrix import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("work", kills.WORKS)
def test_killed_work_ends_as_undisturbed_work_does(work: str, tmp_path: Path) -> None:
    """In a process of its own, as the program forks, which it may not do beside other threads."""
    report = tmp_path / "kills.jsonl"
    argv = ["run", str(report), "--work", work, "--kills", "2", "--seed", "1"]
    subprocess.run([sys.executable, "-m", "tests.kills", *argv], check=True, cwd=ROOT)
    rows = kills.read(report)
    assert [row.how for row in rows] == ["time"] * 2 + ["operation"] * 2
    assert all(row.right for row in rows)
    assert "killed" in [row.outcome for row in rows]


def row(**changes: object) -> kills.Kill:
    found = kills.Kill("convert", 0, "time", 0.5, 2.0, "killed", 0, [], 1, [], "")
    return kills.Kill(**{**vars(found), **changes})  # type: ignore[arg-type]


def test_wrong_kills_are_told() -> None:
    wrong = [row(taken=["a"], before=1), row(unlike=["a"]), row(failed="Traceback"), row(scratch=0)]
    assert [one.right for one in wrong] == [False, False, False, True]
    last = kills.table(wrong).splitlines()[-1]
    assert last == ("| converting a LLaVA checkpoint | moments in 2.0 s | 4 | 3 | 1 | 2 of 4 | 3 |")


def test_files_are_compared_whole(tmp_path: Path) -> None:
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    whole = kills.contents(tmp_path, ["new", "b", "absent"])
    assert whole == {"new/deep/a": b"1", "b": b"2"}
    assert kills.differing({"b": b"3", "c": b""}, whole) == ["b", "c", "new/deep/a"]
