"""The programs that draw the documentation's figures."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "pictures"
TIMED = {"first_screen.png", "first_screen-dark.png"}
METHODS = {"every_method.png", "every_method-dark.png"}
# What `make cells` and `make memory` draw.
CAMPAIGN = {"cells.png", "cells-dark.png", "memory.png", "memory-dark.png"}


@pytest.mark.slow
def test_every_figure_of_the_pages_is_drawn_as_it_is_kept(tmp_path: Path) -> None:
    program = runpy.run_path(str(ROOT / "examples" / "pictures.py"))
    program["main"](["--out", str(tmp_path), "--times", "200", "100"])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn | METHODS | CAMPAIGN == {path.name for path in FOLDER.glob("*.png")}
    for name in drawn:
        new, kept = (Image.open(folder / name).convert("RGB") for folder in (tmp_path, FOLDER))
        assert new.size == kept.size
        # Times differ from machine to machine; what a figure says of tokens does not.
        if name not in TIMED:
            assert new.tobytes() == kept.tobytes(), name


@pytest.mark.parametrize("dark", [False, True])
def test_the_sheet_of_methods_has_letters_that_are_read(
    dark: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sheet.png"
    argv = ["--methods", "uniform", "divprune", "--model", "dynamic", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["every_method.py", *argv, *(["--dark"] if dark else [])])
    runpy.run_path(str(ROOT / "examples" / "every_method.py"), run_name="__main__")
    pixels = Image.open(path).convert("L")
    ground = pixels.getpixel((0, 0))
    assert (ground < 40) if dark else (ground > 250)
    caption = pixels.crop((0, pixels.height - 40, pixels.width // 2, pixels.height))
    darkest, lightest = caption.getextrema()
    assert lightest - darkest > 180


def test_the_sheet_is_of_the_picture_as_a_person_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16)).save(path)
    monkeypatch.setattr(sys, "argv", ["every_method.py", "--image", str(path)])
    main = runpy.run_path(str(ROOT / "examples" / "every_method.py"))["main"]
    shown: list[Image.Image] = []

    def show(model: None, processor: None, image: Image.Image, *more: object) -> None:
        shown.append(image)
        raise KeyboardInterrupt

    monkeypatch.setitem(main.__globals__, "load_builtin", lambda name: (None, None))
    monkeypatch.setitem(main.__globals__, "trace_of", show)
    with pytest.raises(KeyboardInterrupt):
        main()
    assert shown[0].getpixel((0, 0)) == (0x80, 0x80, 0x80)


def test_they_are_of_modest_size() -> None:
    assert all(path.stat().st_size < 300_000 for path in FOLDER.glob("*.png"))
