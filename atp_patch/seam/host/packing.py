"""Rows that hold several samples one after the other, as batches without padding do.

A patched model prunes each row as one sample: its budget, its question and its minimums are those
of the row. Rows of several samples are therefore refused. The host knows them by position ids that
begin again, and by arguments that tell flash attention where sequences begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from atp_patch.contract.errors import InputError

#: Arguments that transformers' DataCollatorWithFlattening makes beside position ids.
SEQUENCES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def sequences_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward pass that tell where sequences begin, by name."""
    return {name: given[name] for name in SEQUENCES if given.get(name) is not None}


def refuse_packed(
    sequences: Mapping[str, Any], position_ids: Tensor | None, attended: Tensor
) -> None:
    """Raise InputError where a row holds several samples.

    Args:
        sequences: as of :func:`sequences_given`.
        position_ids: (..., B or 1, L) int64 on the CPU, or None.
        attended: (B, L) bool on the CPU, False at padding.
    """
    found = _said(sequences)
    if found is None and position_ids is not None:
        found = _begins_again(position_ids, attended)
    if found is not None:
        raise InputError(
            f"a row holds several samples one after the other ({found}), and a patched model "
            "prunes each row as one sample. Give every sample a row of its own, padded, with its "
            "attention_mask: a collator that pads in place of DataCollatorWithFlattening, and in "
            "trl packing=False and padding_free=False."
        )


def _said(sequences: Mapping[str, Any]) -> str | None:
    """Return what the arguments say about several sequences in a row, if they say anything."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        count = len(sequences.get(name, ())) - 1
        if count > 1:
            return f"{name} holds {count} sequences"
    numbers = sequences.get("seq_idx")
    if numbers is not None and bool((numbers != numbers[:, :1]).any()):
        return "seq_idx numbers several sequences"
    return None


def _begins_again(position_ids: Tensor, attended: Tensor) -> str | None:
    """Say where position ids that had counted up go down again, if they do.

    Multimodal ids have a row each for time, row and column, and all of them go down where a sample
    begins; within one sample, time never does. A row of text positions in front says it alone.
    """
    table = position_ids[None] if position_ids.ndim == 2 else position_ids
    table = table[:1] if len(table) == 4 else table
    table = table.expand(-1, len(attended), -1)
    for sample, real in enumerate(attended):
        positions = real.nonzero().flatten()
        ids = table[:, sample, positions]
        # Padding that no mask hides may stand in front with another position than 0.
        counted = ids > ids[:, :1]
        again = ((ids[:, 1:] < ids[:, :-1]) & counted[:, :-1]).all(0).nonzero().flatten()
        if len(again):
            position = int(positions[int(again[0]) + 1])
            return f"in row {sample} the position ids begin again at position {position}"
    return None
