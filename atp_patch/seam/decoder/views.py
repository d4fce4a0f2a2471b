"""Views of layer methods, made of the tokens that are left and of recorded attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract import Attention, AttentionMask, View
from atp_patch.maths import gather_heads, gather_tokens
from atp_patch.seam.decoder.host_pass import HostPass
from atp_patch.seam.decoder.survivors import Survivors
from atp_patch.seam.decoder.visual_tokens import TokenState
from atp_patch.seam.host.prompt import TextRows
from atp_patch.seam.host.recorder import Recording


def view_before(
    layer: int,
    tokens: TokenState,
    text: TextRows,
    host: HostPass,
    recordings: Mapping[int, tuple[int, Recording]],
    hidden: Tensor,
    **more: Any,
) -> View:
    """Make the view of a method that chooses before ``layer``.

    Args:
        layer: the number of the layer.
        tokens, text: the token state and the text rows, on the device of the recordings.
        host: what the host brought to the pass.
        recordings: for each layer that the method asked for, the layer that is read for it and
            that layer's attention.
        hidden: (B, L', D) hidden states that would enter the layer.
        more: further fields of the view.
    """
    visual = tokens.visual
    indices = {number: _indices(number, tokens, text) for number in {layer - 1, *recordings}}
    return tokens.seen(
        View(
            layer=layer,
            attention={
                number: _attention(number, source, tokens, indices[number], host, recording)
                for number, (source, recording) in recordings.items()
            },
            hidden=hidden,
            layout=visual.layout,
            token=visual.token,
            slot_valid=visual.valid,
            text_valid=text.valid,
            text_position=text.position,
            sample_key=text.sample_key,
            **indices[layer - 1],
            **more,
        )
    )


def _indices(layer: int, tokens: TokenState, text: TextRows) -> dict[str, Any]:
    """Return the fields of a view that say where tokens are among those that a layer runs on."""
    return {
        "slot": tokens.columns(layer, tokens.visual.position),
        "text": tokens.columns(layer, text.position),
        "last": tokens.columns(layer, text.last[:, None])[:, 0],
    }


def _attention(
    layer: int,
    source: int,
    tokens: TokenState,
    indices: dict[str, Any],
    host: HostPass,
    recording: Recording,
) -> Attention:
    """Return the attention of a layer, for the tokens that are left now.

    Where the layer itself does not attend, it is that of layer ``source``, an earlier one,
    among the tokens that entered the layer.
    """
    # A static cache has free slots behind the keys.
    new = recording.query.shape[2]
    keys = new + host.earlier_keys(source, new)
    recording = replace(recording, key=recording.key[:, :, :keys])
    mask = AttentionMask(recording.mask, new, keys, tokens.gone(layer))
    entered = tokens.entering(layer)
    if entered is not None and entered is not tokens.entering(source):
        column = tokens.columns(source, entered.index)
        recording, mask = _among(entered, column, recording, mask)
    return Attention(
        query=recording.query,
        key=recording.key,
        mask=mask,
        scaling=recording.scaling,
        softcap=recording.softcap,
        sinks=recording.sinks,
        unrotated=recording.unrotated,
        **indices,
    )


def _among(
    entered: Survivors, column: Tensor, recording: Recording, mask: AttentionMask
) -> tuple[Recording, AttentionMask]:
    """Return the attention of a layer, and its mask, among fewer tokens than the layer ran on.

    Args:
        entered: the tokens that are left.
        column: (B, n) int64, their places among the tokens that the layer ran on.
        recording: the layer's attention.
        mask: its mask.
    """
    column = column.to(recording.query.device)
    new = recording.query.shape[2]
    earlier, own = recording.key.split([recording.key.shape[2] - new, new], dim=2)
    before = torch.arange(earlier.shape[2], device=column.device).expand(len(column), -1)
    keys = torch.cat([before, column + earlier.shape[2]], dim=1)
    valid = torch.cat([torch.ones_like(before, dtype=torch.bool), entered.all_valid], dim=1)
    tables: Any = recording.rotary and tuple(gather_tokens(x, column) for x in recording.rotary)
    fewer = replace(
        recording,
        query=gather_heads(recording.query, column),
        key=torch.cat([earlier, gather_heads(own, column)], dim=2),
        rotary=tables,
    )
    return fewer, mask.among(column, keys, ~valid)
