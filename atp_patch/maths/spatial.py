"""Spatial scores (ATP-LLaVA eq. 5), and resizing grids to one reference size."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate


@lru_cache(maxsize=256)
def progressive_order(height: int, width: int) -> Tensor:
    """Return an order of a grid's places whose first n places cover the grid evenly, for every n.

    It begins at the centre, and each next place is the one farthest from all before it. Of equally
    far places (a grid has many) it is the least crowded one, by the sum of inverse squared
    distances to all before it, and then the first in reading order. Without the second rule equally
    far places would fill the grid from the top.

    Returns:
        (height * width,) int64 on the CPU, the turn of each place, row-major. Calls share the
        tensor, so nothing may write to it.
    """
    # The result is cached, so it is a plain CPU tensor whatever mode or device the caller has set.
    with torch.inference_mode(False), torch.device("cpu"):
        # Both tables hold every offset from (1 - height, 1 - width) on; those of one place are a
        # window in them.
        down, right = torch.arange(1.0 - height, height), torch.arange(1.0 - width, width)
        squared = (down[:, None] ** 2 + right**2).double()
        # Squared distances are whole numbers; crowding stays far below 1 and only separates equals.
        crowding = 1e-3 / squared.clamp(min=1)
        farness = torch.full((height, width), torch.inf, dtype=torch.double)
        crowd = torch.zeros_like(farness)
        order: list[int] = []
        place = (height // 2) * width + width // 2
        while len(order) < height * width:
            order.append(place)
            row, column = divmod(place, width)
            top, left = height - 1 - row, width - 1 - column
            window = (slice(top, top + height), slice(left, left + width))
            torch.minimum(farness, squared[window], out=farness)
            crowd += crowding[window]
            place = int((farness - crowd).argmax())
        turn = torch.empty(height * width, dtype=torch.long)
        turn[torch.tensor(order, dtype=torch.long)] = torch.arange(height * width)
    return turn


def spatial_scores(
    height: int, width: int, *, order: str = "progressive", lambda_sample: float = 3.0
) -> Tensor:
    """Return S_spatial of eq. 5, ``1 - R * lambda_sample`` in [0, 1], for each place of a grid.

    Args:
        height, width: the grid's rows and columns.
        order: "strided" samples with strides 2, 3, 4, ... in both directions, centred; R is then
            the share that is sampled, and a place on several grids takes its highest score. With
            "progressive" the j-th place of :func:`progressive_order` has R = (j + 1) / (height *
            width), which is eq. 5 with every rate.
        lambda_sample: the slope.

    Returns:
        (height * width,) float32, row-major, on the CPU.
    """
    count = height * width
    if order == "progressive":
        rate = (progressive_order(height, width).float() + 1) / count
        return (1 - lambda_sample * rate).clamp(0, 1)
    if order != "strided":
        raise ValueError(f"unknown spatial order {order!r}: progressive or strided")
    scores = torch.zeros(height, width, device="cpu")
    for stride in range(max(height, width), 1, -1):
        top, left = (height - 1) % stride // 2, (width - 1) % stride // 2
        sampled = scores[top::stride, left::stride]
        score = 1 - lambda_sample * sampled.numel() / count
        sampled.clamp_(min=min(max(score, 0.0), 1.0))
    return scores.flatten()


def to_reference_grid(
    values: Tensor,
    grid_id: Tensor,
    row: Tensor,
    col: Tensor,
    valid: Tensor,
    heights: Tensor,
    widths: Tensor,
    size: int = 24,
) -> Tensor:
    """Resize the grids of each sample to ``size`` x ``size`` and average them.

    This gives the threshold heads (eq. 6) inputs of one size for any resolution and any number of
    tiles and frames. It reads the grids' sizes, which waits for the device once.

    Args:
        values, grid_id, row, col, valid: (B, V) values, the grid, row and column in which each
            stands, and bool. Places without a valid value hold 0.
        heights, widths: (B, G) int64 sizes of the grids; 0 where a sample has fewer grids.
        size: the side of the result.

    Returns:
        (B, size, size) in the dtype of ``values``; zeros for a sample without grids.
    """
    sizes = torch.stack([heights, widths], -1).tolist()
    out = values.new_zeros(values.shape[0], size, size)
    for b, sample in enumerate(sizes):
        grids = [(g, h, w) for g, (h, w) in enumerate(sample) if h and w]
        for g, h, w in grids:
            here = valid[b] & (grid_id[b] == g)
            # Values of other grids go to an extra last place, which is cut off.
            place = torch.where(here, row[b] * w + col[b], h * w)
            plane = values.new_zeros(h * w + 1).scatter(0, place, values[b])[: h * w]
            plane = plane.reshape(1, 1, h, w)
            if (h, w) != (size, size):
                plane = interpolate(
                    plane, (size, size), mode="bilinear", align_corners=False, antialias=True
                )
            out[b] += plane[0, 0] / len(grids)
    return out
