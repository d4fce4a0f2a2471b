"""LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision, Granite 4 Vision: a whole view, then rows that end
in a newline.

An image of any resolution is packed as the g x g view of the whole, and behind it the tiles, which
are put together and cut to the picture, row by row, with a newline feature behind each row. An
image of one tile is the view and one newline. Newlines carry the image's id, belong to no grid and
are not pruned unless ``prune_marks`` says so. The places of the newlines are all that is needed;
``image_sizes`` is not known to every forward pass, since ``generate`` keeps it to itself.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from atp_patch.contract import GridQuery, Span, Tower, VisualGrid
from atp_patch.contract.errors import InputError, UnsupportedModelError
from atp_patch.families.base import Family, Grids
from atp_patch.families.towers import square_tower


def _side(config: Any) -> int:
    """Return the tokens along a side of one tile; Granite 4 Vision's are a share of its patches."""
    vision = config.vision_config
    patches = int(vision.image_size) // int(vision.patch_size)
    return int(patches * Fraction(getattr(config, "downsample_rate", None) or 1))


def _refuse(span: Span) -> InputError:
    return InputError(
        f"{span.length} visual tokens from position {span.start} on are no whole images of this "
        "model; let its own processor make input_ids and pixel values together."
    )


def _images(span: Span, newlines: list[int], side: int) -> list[VisualGrid]:
    """Return the views and unpadded pictures of one run of placeholders.

    Args:
        span: the run of placeholders.
        newlines: the positions of the newline features within the run, in order.
        side: how many tokens lie along a side of one tile.
    """
    if not newlines and span.length == side**2:
        return [VisualGrid(span.start, 1, side, side)]  # too flat a picture to have a row
    if not newlines:
        raise InputError(
            f"none of the {span.length} visual tokens from position {span.start} on is the "
            "model's image_newline, which ends the rows of its pictures; pass input_ids and pixel "
            "values, or inputs_embeds with the features that the model itself makes of them."
        )
    grids = []
    start, left = span.start, list(newlines)
    while start < span.stop:
        rows = start + side**2
        if not left or left[0] < rows:
            raise _refuse(span)
        grids.append(VisualGrid(start, 1, side, side))
        width, height = left[0] - rows, 1
        end = left.pop(0)
        while not width and left and left[0] == end + 1:  # too thin a picture to have a column
            end = left.pop(0)
        while width and left and left[0] == end + width + 1:
            end, height = left.pop(0), height + 1
        if width:
            grids.append(VisualGrid(rows, 1, height, width, row_stride=width + 1))
        start = end + 1
    return grids


def _frames(span: Span, start: int, stop: int, side: int) -> VisualGrid:
    """Return a video whose frames are squares that follow each other without gaps."""
    if (stop - start) % side**2:
        raise _refuse(span)
    return VisualGrid(start, (stop - start) // side**2, side, side)


def _videos(span: Span, newlines: list[int], side: int) -> list[VisualGrid]:
    """Return the videos of one run of placeholders.

    Each video of LLaVA-OneVision ends in a newline; a run of LLaVA-NeXT-Video is one video.
    """
    ends = newlines or [span.stop]
    starts = [span.start, *(end + 1 for end in ends[:-1])]
    return [_frames(span, start, end, side) for start, end in zip(starts, ends, strict=True)]


def _frame_side(config: Any) -> int:
    if config.model_type == "llava_next_video":
        return _side(config) // int(config.spatial_pool_stride)
    return math.ceil(_side(config) / 2)


def _grids(query: GridQuery) -> Grids:
    config: Any = query.config
    assert query.newlines is not None
    video = getattr(config, "video_token_id", None)
    found: Grids = []
    for marks, spans in zip(query.newlines, query.spans, strict=True):
        sample = []
        for span in spans:
            within = marks[span.start : span.stop].nonzero().flatten() + span.start
            if span.token_id == video:
                sample += _videos(span, within.tolist(), _frame_side(config))
            else:
                sample += _images(span, within.tolist(), _side(config))
        found.append(sample)
    return found


def _check(config: Any) -> None:
    clip = config.vision_config.model_type.startswith("clip")
    if clip and config.vision_feature_select_strategy == "full":
        raise UnsupportedModelError(
            'vision_feature_select_strategy="full" puts the class token of every tile into the '
            'picture, which is then no grid; set it to "default" in the config.'
        )


def _tower(config: Any) -> Tower | None:
    pools = config.model_type == "llava_onevision"  # the frames of its videos
    packers = ("pack_image_features", *(("apply_pooling",) if pools else ()))
    return square_tower(config, packers=packers)


ANYRES = Family(
    name="llava_next",
    model_types=("llava_next", "llava_next_video", "llava_onevision"),
    grids=_grids,
    token_ids=("image_token_id", "video_token_id"),
    newline="image_newline",
    check=_check,
    tower=_tower,
    layout="the whole, then the unpadded picture, a newline behind each row; videos as frames",
)
GRANITE4_VISION = Family(
    name="granite4_vision",
    model_types=("granite4_vision",),
    grids=_grids,
    newline="image_newline",
    check=_check,
    told_kinds=True,
    layout="the whole, then the unpadded picture, a newline behind each row",
)
