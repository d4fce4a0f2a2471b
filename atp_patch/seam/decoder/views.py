"""Views of layer methods, made of the tokens that are left and of recorded attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from atp_patch.contract import AttentionMask, View
from atp_patch.seam.decoder.host_pass import HostPass
from atp_patch.seam.decoder.visual_tokens import TokenState
from atp_patch.seam.host.prompt import TextRows
from atp_patch.seam.host.recorder import Recording


def view_before(
    layer: int,
    tokens: TokenState,
    text: TextRows,
    host: HostPass,
    recording: Recording,
    hidden: Tensor,
    **more: Any,
) -> View:
    """The view of a method that chooses before ``layer``.

    Args:
        layer: the number of the layer.
        tokens, text: the token state and the text rows, on the device of the recording.
        host: what the host brought to the pass.
        recording: the attention of the layer before.
        hidden: (B, L', D) hidden states that would enter the layer.
        more: further fields of the view.
    """
    visual, query = tokens.visual, recording.query
    # A static cache has free slots behind the keys.
    keys = query.shape[2] + host.earlier_keys(layer - 1, query.shape[2])
    recording = replace(recording, key=recording.key[:, :, :keys])
    return tokens.seen(
        View(
            layer=layer,
            query=query,
            key=recording.key,
            attention_mask=AttentionMask(recording.mask, query.shape[2], keys, tokens.gone()),
            scaling=recording.scaling,
            softcap=recording.softcap,
            sinks=recording.sinks,
            unrotated=recording.unrotated,
            hidden=hidden,
            layout=visual.layout,
            token=visual.token,
            slot=tokens.slots(visual.position),
            slot_valid=visual.valid,
            text=tokens.slots(text.position),
            text_valid=text.valid,
            text_position=text.position,
            last=tokens.slots(text.last[:, None])[:, 0],
            sample_key=text.sample_key,
            **more,
        )
    )
