"""Attention whose keys are weighed by a mask that can be learned (ATP-LLaVA, below eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from atp_patch.contract import AttentionMask
from atp_patch.maths import visible_keys
from atp_patch.seam.learning.fused import FusedWeightedAttention


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    weight: Tensor,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    probabilities: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute softmax attention whose exponentials are multiplied by each key's weight before the
    sum.

    A token always sees itself. With weights of 0 and 1 this is attention without the keys of
    weight 0. The weights of those keys still get a gradient, which adding ``log(weight)`` to the
    logits would stop. The maximum of a row is taken over the keys that count, so that rounding
    never loses the row's sum.

    Args:
        query: (B, H, L, d).
        key, value: (B, Hk, L, d).
        mask: the host's mask, wide or (B, L), or None for causal attention.
        scaling: the factor of the logits.
        weight: (B, L) float in [0, 1].
        dropout: the rate of dropout on the attention probabilities.
        softcap: the bound below which a tanh brings the logits (Gemma 2).
        sinks: (H,) float, a logit of each head that counts in the sums of its softmax and for no
            token (gpt-oss).
        probabilities: return the probabilities too. Without them and without dropout no (L, L)
            table is kept.

    Returns:
        (B, L, H, d) in the dtype of ``value``, and the probabilities (B, H, L, L) or None.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if not probabilities and not dropout and softcap is None and sinks is None:
        seen = AttentionMask(mask, query.shape[2], key.shape[2]).whole(query.device)
        same = (x.to(value.dtype) for x in (query, key, value))
        out = FusedWeightedAttention.apply(*same, weight.float(), seen, scaling)
        return out.transpose(1, 2).contiguous(), None
    logits = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = AttentionMask(mask, query.shape[2], key.shape[2]).whole(query.device)
    if visible.dtype != torch.bool:
        logits = logits + visible
        visible = visible_keys(visible)
    own = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
    weight = weight.to(logits)[:, None, None, :].masked_fill(own, 1.0)
    counting = visible & (weight > 0)
    lowest = torch.finfo(logits.dtype).min
    highest = logits.detach().masked_fill(~counting, lowest).amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks[None, :, None, None].to(logits)
        highest = torch.maximum(highest, sinks.detach())
    # Logits of keys that do not count may exceed the maximum, and are brought down to it so that
    # they stay finite. (From torch 2.15 on clamp() would stop the gradient of the maximum itself.)
    below = logits - highest
    below = below.masked_fill(below > 0, 0.0)
    exponential = below.exp().masked_fill(~visible, 0.0) * weight
    # A row of padding that sees no key gives zeros.
    total = exponential.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - highest).exp()
    probability = exponential / torch.where(total > 0, total, 1.0)
    dropped = drop(probability, dropout, training=dropout > 0).to(value.dtype)
    return (dropped @ value).transpose(1, 2).contiguous(), probability.to(value.dtype)
