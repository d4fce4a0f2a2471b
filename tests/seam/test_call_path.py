"""The way from a view to the gathered tensor is as short as docs/architecture.md says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from tests.helpers import inputs as made
from tests.helpers.run import forward, patched

PATH = [  # the calls that hand the tokens on, and the files in which they are
    ("view_before", "seam/decoder/views.py"),
    ("decide", "patching/patch.py"),
    ("apply", "seam/decoder/gathered_tokens.py"),
    ("narrow_hidden", "seam/decoder/gathered_tokens.py"),
    ("gather_tokens", "maths/indexing.py"),
]


def test_five_calls_over_four_files() -> None:
    model = patched("llava-llama")
    inputs = made.batch(model, made.MIXED)
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name not in {name for name, _ in PATH}:
            return
        file = Path(code.co_filename).as_posix().rpartition("/atp_patch/")[2]
        if (code.co_name, file) in PATH:
            seen.append((code.co_name, file))

    sys.setprofile(note)
    try:
        forward(model, inputs)
    finally:
        sys.setprofile(None)
    first = seen.index(PATH[0])
    on_the_way = iter(seen[first:])
    assert all(step in on_the_way for step in PATH), "a step is missing or out of order"
    assert len({file for _, file in PATH}) == 4
