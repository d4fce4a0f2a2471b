"""`python -m atp_patch.demo --web`: what it refuses, and what it starts with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import atp_patch.web
from atp_patch.commands import demo
from atp_patch.web.engine import Engine, Pruning


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of an error."""
    assert demo.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["picture.png", "What?", "--web"], "leave out IMAGE and QUESTION"),
        (["--web", "--keep", "0.5"], "--keep goes with an IMAGE"),
        (["--web", "--json"], "--json goes with an IMAGE"),
        (["--web", "--port", "70000"], "--port 70000"),
        (["--web", "--method", "magic"], "give one of atp"),
        ([], "give an IMAGE and a QUESTION about it, or --web"),
        (["picture.png"], "give an IMAGE and a QUESTION about it, or --web"),
    ],
)
def test_what_does_not_go_together(
    argv: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in complaint(capsys, *argv)


def test_without_gradio_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        atp_patch.web, "find_spec", lambda name: None if name == "gradio" else found(name)
    )
    assert "pip install 'atp-patch[web]'" in complaint(capsys, "--web")


def test_the_page_starts_with_what_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page itself is stood in for, as it needs gradio."""
    started: list[Any] = []
    page = type("Page", (), {"SHARE": 0.25, "serve": staticmethod(lambda *a: started.append(a))})
    monkeypatch.setattr(atp_patch.web, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "atp_patch.web.page", page)
    argv = ["--web", "--model", "builtin-dynamic", "--layers", "3,5", "--port", "7999"]
    assert demo.main([*argv, "--method", "fastv"]) == 0
    ((engine, builtin, start, port),) = started
    assert isinstance(engine, Engine)
    assert engine.num_layers == 8
    assert builtin == "dynamic"
    assert start == Pruning("fastv", 0.25, (3, 5))
    assert port == 7999
    assert "99" in complaint(capsys, *argv[:3], "--layers", "99")


def test_the_page_needs_no_folder_of_examples() -> None:
    assert "examples" not in Path(atp_patch.web.__file__).with_name("page.py").read_text()
