"""Decoders that write features among the embeddings themselves, as Phi-4 multimodal's does.

What enters their layers is then not among their arguments. So it is made here, by the host's own
modules, and handed to the decoder in place of ids and pixels.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.utils.output_capturing import maybe_install_capturing_hooks

_EXTENDS = "embed_tokens_extend"


def embeds_itself(decoder: Any) -> bool:
    """Return whether the decoder is given pixels, and makes features of them."""
    return hasattr(decoder, _EXTENDS)


def embedded(decoder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the decoder's arguments with embeddings, features among them, in place of ids and
    pixels.

    The arguments are returned as they are where they hold embeddings already.
    """
    ids = kwargs.get("input_ids")
    if ids is None or kwargs.get("inputs_embeds") is not None:
        return kwargs
    if _asks_for_inner_outputs(decoder, kwargs):
        # The host hooks a decoder and its towers in one go. Towers that ran before that would get
        # their hooks twice.
        maybe_install_capturing_hooks(decoder)
    extends = getattr(decoder, _EXTENDS)
    names = set(inspect.signature(type(extends).forward).parameters) - {"input_ids"}
    features = {name: value for name, value in kwargs.items() if name in names}
    features["inputs_embeds"] = decoder.embed_tokens(ids)
    others = {name: value for name, value in kwargs.items() if name not in names}
    return {**others, "input_ids": None, "inputs_embeds": extends(ids, **features)}


def _asks_for_inner_outputs(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the call or the configuration asks for hidden states or attention maps."""
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name, getattr(decoder.config, name, False)) for name in names)
