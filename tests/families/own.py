"""A family in one file, as an outside package would write it for a model of its own."""

from __future__ import annotations

from typing import Any

from atp_patch import Family, GridQuery, VisualGrid


def side(config: Any) -> int:
    """Visual tokens along a side of a tile."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size // config.downsample_factor)


def grids(query: GridQuery) -> list[list[VisualGrid]]:
    """The grids of each sample: a run of placeholders is one tile after the other."""
    n = side(query.config)
    return [
        [
            VisualGrid(start, frames=1, height=n, width=n)
            for span in spans
            for start in range(span.start, span.stop, n * n)
        ]
        for spans in query.spans
    ]


OWN = Family(name="own", model_types=("own_vlm",), grids=grids)
