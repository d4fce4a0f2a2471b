"""The program that draws the documentation's pictures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NAMES = {"first_screen.png", "stairs.png", "one_layer.png"}


@pytest.mark.slow
def test_it_draws_every_picture_of_the_pages(tmp_path: Path) -> None:
    program = runpy.run_path(str(ROOT / "examples" / "pictures.py"))
    program["main"](["--out", str(tmp_path), "--rounds", "1"])
    kept = {path.name: Image.open(path) for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert set(kept) == NAMES == {path.name for path in tmp_path.iterdir()}
    for name, picture in kept.items():
        drawn = Image.open(tmp_path / name)
        assert drawn.size == picture.size
        # Times differ from machine to machine; what a picture says of tokens does not.
        if name != "first_screen.png":
            assert drawn.convert("RGB").tobytes() == picture.convert("RGB").tobytes()


def test_they_are_of_modest_size() -> None:
    assert all((ROOT / "docs" / "pictures" / name).stat().st_size < 300_000 for name in NAMES)
