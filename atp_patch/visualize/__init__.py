"""Drawings of what a patched model keeps, over the pictures that it saw, as PNG and SVG.

    from atp_patch import visualize

    trace = visualize.with_pictures(
        atp_patch.last_trace(model), image, inputs, processor, question=question, answer=answer
    )
    visualize.overlay(trace).save("overlay.svg")

A :class:`Drawing` shows itself in a notebook, and so does a trace with pictures. Drawing needs
matplotlib: ``pip install "atp-patch[visualize]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atp_patch.lazy import lazily

if TYPE_CHECKING:  # what type checkers and editors read; _HOMES says the same to Python
    from atp_patch.visualize.canvas import Drawing
    from atp_patch.visualize.drawings import (
        compare,
        depth_plot,
        heat_map,
        overlay,
        strip,
        with_pictures,
    )
    from atp_patch.visualize.pictures import Part, Picture, seen

__all__ = [
    "Drawing",
    "Part",
    "Picture",
    "compare",
    "depth_plot",
    "heat_map",
    "overlay",
    "seen",
    "strip",
    "with_pictures",
]

# module -> the public names that it holds
_HOMES = {
    "atp_patch.visualize.canvas": ("Drawing",),
    "atp_patch.visualize.drawings": (
        "compare",
        "depth_plot",
        "heat_map",
        "overlay",
        "strip",
        "with_pictures",
    ),
    "atp_patch.visualize.pictures": ("Part", "Picture", "seen"),
}
__getattr__, __dir__ = lazily(__name__, _HOMES)
