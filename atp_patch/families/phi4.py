"""Phi-4 multimodal: the unpadded picture, a mark, then the whole; a mark ends each of their rows.

All of them have the image's id. How much of the tiles is picture and how much is padding, only the
masks of the tiles' patches tell.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from atp_patch.contract import GridQuery, Span, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids
from atp_patch.families.sizes import PIXELS, Films, in_order, mismatch

MASKS = "image_attention_mask"


def _grids(query: GridQuery) -> Grids:
    config: Any = query.config
    given = query.sizes_given
    if PIXELS not in given or MASKS not in given:
        raise InputError(
            f"nothing else tells the rows of this model's images: pass {PIXELS} and {MASKS} of its "
            "processor with the call, to generate too."
        )
    vision = config.vision_config
    side = -(-(int(vision.image_size) // int(vision.patch_size)) // 2)  # of a tile, in tokens
    sizes = (given[PIXELS].reshape(-1, 2) // int(vision.crop_size)).tolist()
    parts = (
        _unpadded(down, across, mask)
        for (down, across), mask in zip(sizes, given[MASKS], strict=True)
    )
    films: dict[str, Films] = {PIXELS: deque((1, height, width) for height, width in parts)}

    def place(span: Span, name: str, left: Films) -> list[VisualGrid]:
        grids: list[VisualGrid] = []
        at = span.start
        while at < span.stop:
            _, height, width = left.popleft() if left else (0, 0, 0)
            whole = at + height * (width + 1) + 1
            if not height or whole + side * (side + 1) > span.stop:
                raise mismatch(span, name)
            grids.append(VisualGrid(at, 1, height, width, row_stride=width + 1))
            grids.append(VisualGrid(whole, 1, side, side, row_stride=side + 1))
            at = whole + side * (side + 1)
        return grids

    return in_order(query, films, lambda _, span: PIXELS, place)


def _unpadded(down: int, across: int, mask: Tensor) -> tuple[int, int]:
    """Return the rows and columns of the tokens that are not padding.

    Args:
        down, across: how many tiles lie in a column and in a row.
        mask: (1 + tiles, h, w), 1 at patches of the picture, for the whole and then for the tiles.
    """
    tiles = mask[1 : 1 + down * across, ::2, ::2].bool().unflatten(0, (down, across))
    return int(tiles[:, 0, :, 0].sum()), int(tiles[0, :, 0].sum())


PHI4_MULTIMODAL = Family(
    name="phi4_multimodal",
    model_types=("phi4_multimodal",),
    grids=_grids,
    token_ids=("vision_config.image_token_id",),
    layout="the unpadded picture, then the whole, a mark behind each row",
)
