"""The example that draws one picture under every method."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "every_method.py"
PANELS, DPI = 3, 120


def test_it_draws_what_each_method_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sheet.png"
    argv = [str(SCRIPT), "--out", str(out), "--methods", "uniform", "prunesid", "pyramiddrop"]
    monkeypatch.setattr("sys.argv", argv)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    sheet = np.asarray(Image.open(out).convert("L"))
    assert sheet.shape[1] == pytest.approx(DPI * (PANELS * 2.4 + 2 * 0.12 + 0.2), abs=1)
    wide = (sheet.shape[1] - 13) // PANELS * PANELS
    pictures = np.split(sheet[47:317, 12 : 12 + wide], PANELS, 1)
    dark = [float((picture < 100).mean()) for picture in pictures]
    # At the same average uniform leaves few tokens in the last layers, prunesid a quarter in all.
    assert 0 < dark[0] < dark[1] < 0.3
    assert not np.array_equal(pictures[1], pictures[2])
