"""Narrowing the attention masks that the decoder hands to its layers.

transformers makes masks of these kinds: None or bool (B, 1, Q, K) for sdpa, float (B, 1, Q, K) for
eager, None or (B, K) for flash. A wide mask is never rebuilt. Its rows and columns are gathered, so
that any pattern in it (padding, sliding windows, prefixes) stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.seam.host.cache import PrunedLayer, PrunedStaticLayer, columns


def is_flash(implementation: str) -> bool:
    """Return whether an attention implementation takes 2D masks and looks for packed sequences
    itself.
    """
    return "flash" in implementation


def check_implementation(implementation: str) -> None:
    """Raise UnsupportedModelError for implementations whose masks cannot be narrowed."""
    if implementation == "flex_attention" or implementation.startswith("paged"):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} is not supported while patched; call "
            "model.set_attn_implementation('sdpa') (or 'eager', 'flash_attention_2')."
        )


def gather_rows(mask: Tensor, index: Tensor) -> Tensor:
    """Return some rows of a mask: (B or 1, h, Q, K) and index (B, n) give (B, h, n, K)."""
    batch, n = index.shape
    _, heads, _, width = mask.shape
    wide = mask.expand(batch, -1, -1, -1)
    return wide.gather(2, index[:, None, :, None].expand(batch, heads, n, width))


def gather_columns(mask: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """Return some columns of a mask; columns outside of it, and invalid ones, are hidden.

    Args:
        mask: (B or 1, h, Q, W), or (B, W).
        index: (B, K) columns, possibly outside [0, W).
        valid: (B, K) bool, or None where all are valid.

    Returns:
        (B, h, Q, K), or (B, K).
    """
    width = mask.shape[-1]
    index = index.to(mask.device)  # a model on several devices has its masks on the first
    seen = (index >= 0) & (index < width)
    if valid is not None:
        seen = seen & valid.to(mask.device)
    column = index.clamp(0, width - 1)
    if mask.ndim == 2:
        return mask.gather(1, column) * seen.to(mask.dtype)
    batch, keys = index.shape
    _, heads, rows, _ = mask.shape
    wide = mask.expand(batch, -1, -1, -1)
    out = wide.gather(3, column[:, None, None, :].expand(batch, heads, rows, keys))
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return out.masked_fill(~seen[:, None, None, :], hidden)


def causal_mask(rows: Tensor, keys: Tensor, valid: Tensor | None, *, flat: bool) -> Tensor | None:
    """Return the causal mask of survivors whose padding slots do not stand last, where the host has
    none.

    Args:
        rows: (B, n) int64 positions of the survivors.
        keys: (B, K) int64 logical positions of the keys.
        valid: (B, K) bool, or None where all are valid.
        flat: the attention is causal by itself and takes a mask (B, K).

    Returns:
        (B, 1, n, K) bool, or ``valid``.
    """
    if flat or valid is None:
        return valid
    return ((keys[:, None, :] <= rows[..., None]) & valid[:, None, :])[:, None]


def prefill_mask(
    mask: Tensor | None,
    rows: Tensor,
    keys: Tensor,
    keys_valid: Tensor | None,
    *,
    total: int,
    causal_suffices: bool,
) -> Tensor | None:
    """Return the mask of the layers that run on survivors alone, or None where they need none.

    Args:
        mask: what the host gives these layers for the whole sequence.
        rows: (B, n) int64 places of the survivors in the sequence of this pass.
        keys: (B, K) int64 logical positions of the keys.
        keys_valid: (B, K) bool, or None where all are valid.
        total: the logical length, earlier turns included.
        causal_suffices: True where the host's mask says no more than causality and padding, nothing
            is cached yet, and the attention is causal by itself. No mask is needed then, because
            survivors stand in order, and padding slots stand last, where causality hides them.
    """
    if mask is None or causal_suffices:
        return None
    if mask.ndim == 2:
        return gather_columns(mask, keys - (total - mask.shape[-1]), keys_valid)
    offset = max(total - mask.shape[-1], 0)
    return gather_columns(gather_rows(mask, rows), keys - offset, keys_valid)


def decode_mask(
    mask: Tensor | None, layer: PrunedLayer, query_length: int, *, flash: bool
) -> Tensor | None:
    """Return the mask of a layer that holds a pruned prompt, for ``query_length`` new tokens.

    The result is None where the host needs no mask and no slot is empty; this takes constant time.
    """
    if mask is None and layer.valid is None:
        return None
    offset = 0  # a static mask begins at position 0
    if isinstance(layer, PrunedStaticLayer):
        positions, valid = layer.slots, layer.slots_valid
    else:
        width = layer.keys.shape[-2] + query_length
        positions, valid = columns(layer, width)
        if mask is not None:  # the last column of a growing mask is the newest token
            offset = max(width + layer.dropped - mask.shape[-1], 0)
    if mask is None:
        assert valid is not None
        return valid if flash else valid[:, None, None, :]
    return gather_columns(mask, positions - offset, valid)
