"""Tombstones: features of visual tokens that a method dropped before the decoder.

Between the vision tower and the decoder the host splits, packs, unpads, repeats (for beams) and
scatters features in its own way. A dropped token is therefore marked in its feature itself, so that
none of this has to be known. A tombstone in an even place of the grid (row + column) holds NaN in
every even channel, one in an odd place holds infinity in every odd channel, and the rest is 0.
Where the host mixes neighbours (it may resize a grid), the result is neither of the two and no
feature of a picture either, so that it is reported and never leads to a wrong choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


def with_tombstones(features: Tensor, rows: Tensor, parity: Tensor) -> Tensor:
    """Return the features with tombstones in some rows.

    Args:
        features: (N, D).
        rows: (r,) int64, the rows that become tombstones.
        parity: (r,) int64, row + column of each of them in its grid.
    """
    odd = (parity % 2 == 1)[:, None]
    channel = torch.arange(features.shape[1], device=features.device) % 2 == 1
    stone = torch.where(odd, torch.inf, torch.nan).masked_fill(channel != odd, 0)
    return features.index_put((rows,), stone.to(features.dtype))


def find_tombstones(embeds: Tensor) -> Tensor:
    """Return (B, L) bool: which of the embeddings (B, L, D) are tombstones."""
    even, odd = embeds.detach()[..., 0], embeds.detach()[..., 1]
    return (even.isnan() & (odd == 0)) | ((even == 0) & odd.isposinf())


def are_mixed(features: Tensor) -> bool:
    """Return whether some of these features (n, D) are tombstones that were mixed with other
    features.
    """
    even, odd = features[:, 0::2], features[:, 1::2]
    of_even = even.isnan().all(1) & ~odd.isnan().any(1)
    of_odd = odd.isposinf().all(1) & even.isfinite().all(1)
    return bool((of_even | of_odd).any())


def clear_outputs(output: Any) -> None:
    """Put zeros in place of tombstones in the image features that a forward pass returns.

    Until transformers 5.23 models return them as ``image_hidden_states``, and from 5.24 on within
    the whole outputs of their encoders.
    """
    if not isinstance(output, ModelOutput):
        return
    if output.get("image_hidden_states") is not None:
        output.image_hidden_states = without_tombstones(output.image_hidden_states)
    for name in ("image_outputs", "video_outputs"):
        encoded = output.get(name)
        if encoded is not None:  # it may be the caller's own, so it stays as it is
            cleared = replace(encoded, pooler_output=without_tombstones(encoded.pooler_output))
            setattr(output, name, cleared)


def without_tombstones(features: Any) -> Any:
    """Return features, or lists of them, with zeros in place of tombstones; anything else is
    returned as it is.
    """
    if isinstance(features, Tensor):
        return features.masked_fill(find_tombstones(features)[..., None], 0)
    if isinstance(features, (list, tuple)):
        return type(features)(without_tombstones(part) for part in features)
    return features
