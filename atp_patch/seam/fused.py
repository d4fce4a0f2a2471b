"""Weighted attention for long sequences: the (L, L) tables are made a few at a time, and made anew
on the way back, so that none is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers in the tables of one step: on a CPU what its caches hold, else what fills a GPU.
_CPU_NUMBERS, _GPU_NUMBERS = 2**20, 2**26
_NOTHING = -80.0  # a logit so far below the greatest adds nothing; exponentials of less are slow


class FusedWeightedAttention(torch.autograd.Function):
    """Softmax attention with weighted exponentials, in memory linear in the sequence.

    Arguments: query, key and value (B, H, L, d) of one dtype, weight (B, L) float32 in [0, 1], mask
    (B or 1, H or 1, L, L) bool (True = visible) or float (added to the logits), scaling.
    Returns (B, H, L, d) in that dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        mask: Tensor,
        scaling: float,
    ) -> Tensor:
        """The weighted mean of the values, and what the way back needs of each row."""
        out = torch.empty_like(value)
        # Of each row: the greatest logit of the keys that count, and the log of the sum.
        highest = query.new_empty(query.shape[:3], dtype=torch.float32)
        total = torch.empty_like(highest)
        for b, heads, visible, wide in _steps(query, weight, mask):
            logits = _logits(query[b, heads], key[b, heads], _of(mask, b, heads), scaling)
            logits.masked_fill_(~(visible & (wide > 0)), torch.finfo(logits.dtype).min)
            top = logits.amax(-1, keepdim=True)
            probability = logits.sub_(top).clamp_(min=_NOTHING).exp_().mul_(wide).mul_(visible)
            # A row of padding that sees nothing gives zeros.
            tiny = torch.finfo(logits.dtype).tiny
            sums = probability.sum(-1, keepdim=True).clamp_(min=tiny)
            mean = probability.to(value.dtype) @ value[b, heads]
            out[b, heads] = (mean.float() / sums).to(value.dtype)
            highest[b, heads], total[b, heads] = top[..., 0], sums.log_()[..., 0] + top[..., 0]
        ctx.save_for_backward(query, key, value, weight, mask, out, highest, total)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and weight; those of keys that do not count included."""
        (grad,) = grads
        query, key, value, weight, mask, out, highest, total = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        d_weight = torch.zeros_like(weight)
        grad = grad.to(value.dtype)
        mean = (grad.float() * out.float()).sum(-1, keepdim=True)
        for b, heads, visible, wide in _steps(query, weight, mask):
            q, k, g = query[b, heads], key[b, heads], grad[b, heads]
            logits = _logits(q, k, _of(mask, b, heads), ctx.scaling)
            # Keys that do not count may lie above the maximum; clamping keeps them finite.
            logits = torch.minimum(logits, highest[b, heads, :, None])
            share = logits.sub_(total[b, heads, :, None]).clamp_(min=_NOTHING).exp_()
            share.mul_(visible)
            slope = (g @ value[b, heads].transpose(-1, -2)).float().sub_(mean[b, heads])
            slope.mul_(share)
            by_key = slope.sum((0, 1)) - slope.diagonal(dim1=-2, dim2=-1).sum(0)  # own: always 1
            d_weight[b] += by_key
            d_value[b, heads] = share.mul_(wide).to(value.dtype).transpose(-1, -2) @ g
            slope = slope.mul_(wide).mul_(ctx.scaling).to(query.dtype)
            d_query[b, heads] = slope @ k
            d_key[b, heads] = slope.transpose(-1, -2) @ q
        return d_query, d_key, d_value, d_weight, None, None


def _steps(
    query: Tensor, weight: Tensor, mask: Tensor
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Sample, heads, which keys each row sees (h, L, L) and their weights (1, L, L), step by
    step.
    """
    batch, heads, length, _ = query.shape
    numbers = _CPU_NUMBERS if query.device.type == "cpu" else _GPU_NUMBERS
    width = max(1, numbers // length**2)
    own = torch.eye(length, dtype=torch.bool, device=query.device)
    for b in range(batch):
        wide = weight[b].expand(length, length).masked_fill(own, 1.0)[None]
        for start in range(0, heads, width):
            part = slice(start, start + width)
            visible = _of(mask, b, part)
            if visible.dtype != torch.bool:
                visible = visible > torch.finfo(visible.dtype).min / 2
            yield b, part, visible, wide


def _of(mask: Tensor, b: int, heads: slice) -> Tensor:
    """(h or 1, L, L) of one sample and some heads."""
    sample = mask[b if mask.shape[0] > 1 else 0]
    return sample if sample.shape[0] == 1 else sample[heads]


def _logits(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(h, L, L) float32, a float mask added."""
    logits = (query @ key.transpose(-1, -2)).float().mul_(scaling)
    return logits if mask.dtype == torch.bool else logits.add_(mask)
