"""Marks in features that go: they travel with the host's own packing to the decoder's door.

Between the vision tower and the decoder the host splits, packs, unpads, repeats (beams) and
scatters features its own way. A dropped token is marked in its feature itself, so none of that has
to be known. Every other channel of a mark is NaN and the rest is 0, in turns like the fields of a
chessboard: where the host mixes neighbours (it may resize a grid), what comes out is no mark any
more, and that is an error, never a wrong choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.errors import InputError


def marked(features: Tensor, rows: Tensor, parity: Tensor) -> Tensor:
    """Features with marks in some rows.

    Args:
        features: (N, D); ``rows``: (r,) int64; ``parity``: (r,) int64 row + column in the grid.
    """
    channel = torch.arange(features.shape[1], device=features.device)
    gone = (channel + parity[:, None]) % 2 == 0
    mark = torch.zeros(gone.shape, dtype=features.dtype, device=features.device)
    return features.index_put((rows,), mark.masked_fill(gone, torch.nan))


def read_marks(embeds: Tensor) -> Tensor:
    """(B, L) bool: tokens that are marked, among embeddings (B, L, D).

    Raises:
        InputError: where marks were mixed with other features.
    """
    pair = embeds.detach()[..., :2]
    missing = pair.isnan()
    found = missing.any(-1)
    torn = found & (missing.all(-1) | (pair.nan_to_num().abs().sum(-1) > 0))
    if bool(torn.any()):
        raise InputError(
            "the model resized its grid of visual tokens after they were chosen (LLaVA-OneVision "
            "does so with videos and with pictures of many tiles); give it pictures of fewer "
            "tiles, or use a method that prunes inside the decoder."
        )
    return found


def wiped(features: Any) -> Any:
    """Features, or lists of them, with zeros in place of marks; anything else as it is."""
    if isinstance(features, Tensor):
        return features.nan_to_num() if bool(features.isnan().any()) else features
    if isinstance(features, (list, tuple)):
        return type(features)(wiped(part) for part in features)
    return features
