"""The generic family: any decoder of transformers' layers, told which tokens are visual.

It is never found by itself: ``patch_model(model, family="generic")`` asks for it. Each call then
brings ``visual_mask``, (batch, sequence) bool, and may bring ``visual_grids``, which holds for each
sample a list of (frames, height, width), one for each image in order. The tokens that the mask
marks fill these grids row by row. Gaps are allowed where they are even (a newline token behind each
row, a class token before each frame). Without grids each run of marked tokens is one image of a
single row.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from atp_patch.contract import GridQuery, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids


def _runs(visual: Tensor) -> list[VisualGrid]:
    """Read each run of True in an (L,) mask as an image of one row."""
    places = visual.nonzero().flatten()
    if not len(places):
        return []
    first = (places.diff(prepend=places[:1] - 2) != 1).nonzero().flatten()
    lengths = first.diff(append=first.new_tensor([len(places)]))
    return [
        VisualGrid(int(places[at]), 1, 1, int(length))
        for at, length in zip(first, lengths, strict=True)
    ]


def _filled(visual: Tensor, sizes: Sequence[tuple[int, int, int]]) -> list[VisualGrid]:
    """Fill grids of these sizes in order with the places where an (L,) mask is True."""
    places = visual.nonzero().flatten()
    wanted = sum(t * h * w for t, h, w in sizes)
    if len(places) != wanted:
        raise InputError(
            f"visual_mask marks {len(places)} tokens of a sample, but its visual_grids "
            f"{[tuple(size) for size in sizes]} hold {wanted}."
        )
    grids, at = [], 0
    for frames, height, width in sizes:
        own = places[at : at + frames * height * width]
        at += len(own)
        start = int(own[0])
        grid = VisualGrid(
            start,
            frames,
            height,
            width,
            row_stride=int(own[width]) - start if height > 1 else 0,
            frame_stride=int(own[height * width]) - start if frames > 1 else 0,
        )
        if not grid.coordinates()[0].equal(own.cpu()):
            raise InputError(
                f"the visual tokens from position {start} on lie too unevenly for a grid of "
                f"{(frames, height, width)}: rows must follow each other at equal distances, and "
                "so must frames. Give each even part as a grid of its own."
            )
        grids.append(grid)
    return grids


def _grids(query: GridQuery) -> Grids:
    assert query.visual is not None
    if query.sizes is None:
        return [_runs(row) for row in query.visual]
    if len(query.sizes) != len(query.visual):
        raise InputError(
            f"visual_grids has {len(query.sizes)} lists for {len(query.visual)} samples; give one "
            "list for each sample, and an empty one where it has no image."
        )
    return [_filled(row, sizes) for row, sizes in zip(query.visual, query.sizes, strict=True)]


GENERIC = Family(
    name="generic",
    model_types=(),
    grids=_grids,
    token_ids=(),
    causal=False,
    layout="as the caller says",
)
