"""Undoing the rotary embedding of a layer's queries and keys, by the host's own function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.errors import UnsupportedModelError

Tables = tuple[Tensor, ...] | Tensor


def _in_windows(attention: Any) -> bool:
    return attention.sliding_window is not None


def _in_windows_or_without_any(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


# Attentions that leave rotary embedding out in layers that see the whole sequence. Those that are
# not here say it by an attribute use_rope, or are given no tables, or always rotate.
_ROTATES: dict[str, Callable[[Any], bool]] = {
    "AfmoeAttention": lambda attention: attention.is_local_attention,
    "Cohere2Attention": _in_windows,
    "Cohere2MoeAttention": lambda attention: _in_windows(attention) or attention.force_rope,
    "Exaone4Attention": _in_windows_or_without_any,
    "Exaone4_5_Attention": _in_windows_or_without_any,
    "ExaoneMoeAttention": _in_windows_or_without_any,
    "FlintAttention": _in_windows,
    "Kolibri1Attention": _in_windows_or_without_any,
}


def rotates(attention: Any, tables: Tables | None) -> bool:
    """Return whether an attention applies the rotary tables of its layer.

    Args:
        attention: the attention of a decoder layer.
        tables: the layer's tables; empty where the host gave it none.
    """
    if isinstance(tables, tuple) and not tables:
        return False
    if hasattr(attention, "use_rope"):
        return bool(attention.use_rope)
    rule = _ROTATES.get(type(attention).__name__)
    return rule is None or bool(rule(attention))


def rotated_back(
    attention: Any, tables: Tables | None, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Return queries and keys as they were before rotary embedding.

    They are rotated back by the host's own function with negated angles, so that any convention of
    the host is followed.

    Args:
        attention: the attention that rotated them.
        tables: (cos, sin), or one table of complex numbers, as the layer was given them; empty
            where the host gave it none; None where they are unknown.
        query: (B, H, Q, d).
        key: (B, Hk, Q, d).

    Raises:
        UnsupportedModelError: where the host has no such function, or changes its queries and keys
            after rotating them.
    """
    if not rotates(attention, tables):
        return query, key
    rotate = _function(attention, isinstance(tables, Tensor))
    if rotate is None or tables is None or hasattr(attention, "query_layernorm"):
        raise UnsupportedModelError(
            f"the rotary embedding of {type(attention).__name__} cannot be undone; "
            'score after it (in fastv: rope="after").'
        )
    # Scaled tables (of long contexts) scale once in the host's call and once in this one.
    if isinstance(tables, Tensor):
        scale = float(tables.flatten()[0].abs() ** 2)
        rows = (query.transpose(1, 2), key.transpose(1, 2))
        query, key = (rotated.transpose(1, 2) for rotated in rotate(*rows, tables.conj()))
        return query / scale, key / scale
    cos, sin = tables
    scale = float(cos.flatten()[0].float() ** 2 + sin.flatten()[0].float() ** 2)
    # With latent attention the end of each head alone is rotated. The host may have changed the
    # order of its numbers too, alike in queries and keys, and that order stays.
    start = getattr(attention, "qk_nope_head_dim", 0)
    ends = (query[..., start:], key[..., start:])
    # Some hosts' functions rotate one tensor a call, others queries and keys together.
    if next(iter(inspect.signature(rotate).parameters)) == "x":
        rotated = tuple(rotate(end, cos, -sin) for end in ends)
    else:
        rotated = rotate(*ends, cos, -sin)
    if start == 0:
        return rotated[0] / scale, rotated[1] / scale
    heads = (query[..., :start], key[..., :start])
    query, key = (
        torch.cat([head, end / scale], -1) for head, end in zip(heads, rotated, strict=True)
    )
    return query, key


def _function(attention: Any, complex_tables: bool) -> Any:
    """Return the function by which the host rotates queries and keys, or None."""
    home = sys.modules[type(attention).__module__]
    name = "apply_rotary_emb" if complex_tables else "apply_rotary_pos_emb"
    rotate = getattr(home, name, None)
    sections = getattr(home, "apply_multimodal_rotary_pos_emb", None)
    if rotate is None and sections is not None:  # early hosts join M-RoPE's sections here
        rotate = partial(sections, mrope_section=attention.config.rope_parameters["mrope_section"])
    return rotate
