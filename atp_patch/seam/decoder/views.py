"""Views of layer methods, made of the tokens that are left and of recorded attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from atp_patch.contract import Attention, AttentionMask, View
from atp_patch.seam.decoder.host_pass import HostPass
from atp_patch.seam.decoder.visual_tokens import TokenState
from atp_patch.seam.host.prompt import TextRows
from atp_patch.seam.host.recorder import Recording


def view_before(
    layer: int,
    tokens: TokenState,
    text: TextRows,
    host: HostPass,
    recordings: Mapping[int, Recording],
    hidden: Tensor,
    **more: Any,
) -> View:
    """The view of a method that chooses before ``layer``.

    Args:
        layer: the number of the layer.
        tokens, text: the token state and the text rows, on the device of the recordings.
        host: what the host brought to the pass.
        recordings: layer -> its attention, for each layer that the method asked for.
        hidden: (B, L', D) hidden states that would enter the layer.
        more: further fields of the view.
    """
    visual = tokens.visual
    return tokens.seen(
        View(
            layer=layer,
            attention={
                number: _attention(number, tokens, text, host, recording)
                for number, recording in recordings.items()
            },
            hidden=hidden,
            layout=visual.layout,
            token=visual.token,
            slot=tokens.columns(layer - 1, visual.position),
            slot_valid=visual.valid,
            text=tokens.columns(layer - 1, text.position),
            text_valid=text.valid,
            text_position=text.position,
            last=tokens.columns(layer - 1, text.last[:, None])[:, 0],
            sample_key=text.sample_key,
            **more,
        )
    )


def _attention(
    layer: int, tokens: TokenState, text: TextRows, host: HostPass, recording: Recording
) -> Attention:
    """The attention of a layer, for the tokens that are left now."""
    query = recording.query
    # A static cache has free slots behind the keys.
    keys = query.shape[2] + host.earlier_keys(layer, query.shape[2])
    recording = replace(recording, key=recording.key[:, :, :keys])
    return Attention(
        query=query,
        key=recording.key,
        mask=AttentionMask(recording.mask, query.shape[2], keys, tokens.gone(layer)),
        scaling=recording.scaling,
        softcap=recording.softcap,
        sinks=recording.sinks,
        slot=tokens.columns(layer, tokens.visual.position),
        text=tokens.columns(layer, text.position),
        last=tokens.columns(layer, text.last[:, None])[:, 0],
        unrotated=recording.unrotated,
    )
