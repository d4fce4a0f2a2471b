"""Weighted attention for long sequences: the (L, L) tables are made a few rows at a time, and made
anew on the way back, so that none is kept.

What is hidden or weighs nothing costs little: a block of rows looks no further than its last
visible key, and keys of weight 0 come into it on the way back alone, for their weights' gradients.
Rows that no gradient reaches, as those of pruned tokens, are left out on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_patch.maths import visible_keys

# Numbers in the tables of one step: on a CPU what its caches hold, else what fills a GPU.
_CPU_NUMBERS, _GPU_NUMBERS = 2**19, 2**26
_CPU_ROWS, _GPU_ROWS = 128, 1024
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
        scaled = query * scaling
        own = _own_logits(scaled, key, mask)
        lowest, tiny = (getattr(torch.finfo(torch.float32), name) for name in ("min", "tiny"))
        every = torch.arange(query.shape[2], device=query.device)
        for b in range(len(query)):
            keys = _Keys.of(b, weight[b] > 0, key, value, _of_sample(mask, b), every)
            for rows, heads, n in keys.blocks():
                at = (b, heads, rows)
                seen, k, v = keys.part(rows, heads, n)
                logits = keys.biased(scaled[at] @ k.transpose(-1, -2), rows, heads, n)
                logits.masked_fill_(~seen, lowest)
                top = torch.maximum(logits.amax(-1), own[at]) if n else own[at]
                wide = seen * weight[b, keys.place[:n]]
                shares = logits.sub_(top[..., None]).clamp_(min=_NOTHING).exp_().mul_(wide)
                of_self = (own[at] - top).exp_().mul_(own[at] > lowest)
                # A row of padding that sees nothing gives zeros.
                sums = (shares.sum(-1) + of_self).clamp_(min=tiny)
                mean = (shares.to(v.dtype) @ v).float() + of_self[..., None] * value[at]
                out[at] = (mean / sums[..., None]).to(value.dtype)
                highest[at], total[at] = top, sums.log_() + top
        ctx.save_for_backward(query, key, value, weight, mask, out, highest, total, own)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and weight; those of keys that do not count included."""
        query, key, value, weight, mask, out, highest, total, own = ctx.saved_tensors
        grad = grads[0].to(value.dtype)
        mean = (grad.float() * out.float()).sum(-1)
        scaled = query * ctx.scaling
        # A token itself always counts, and with weight 1.
        share = (own - total).exp_().mul_(own > torch.finfo(own.dtype).min)
        slope = ((grad.float() * value.float()).sum(-1) - mean) * share
        share, slope = (x[..., None].to(value.dtype) for x in (share, slope))
        d_scaled, d_key, d_value = slope * key, slope * scaled, share * grad
        d_weight = torch.zeros_like(weight)
        reached = grad.ne(0).any(-1).any(1)
        for b in range(len(query)):
            row = reached[b].nonzero()[:, 0]
            of_rows = (scaled, grad, highest, total, mean)
            rows = _Rows(*(x[b].index_select(1, row) for x in of_rows))
            seen = _of_sample(mask, b).index_select(-2, row)
            for counting in (True, False):
                if not counting and not ctx.needs_input_grad[3]:
                    continue
                keys = _Keys.of(b, (weight[b] > 0) == counting, key, value, seen, row)
                wide = weight[b, keys.place] if counting else None
                to_weight, to_query, to_key, to_value = _way_back(rows, keys, wide)
                d_weight[b, keys.place] = to_weight
                if counting:
                    d_scaled[b].index_add_(1, row, to_query)
                    d_key[b].index_add_(1, keys.place, to_key)
                    d_value[b].index_add_(1, keys.place, to_value)
        return d_scaled * ctx.scaling, d_key, d_value, d_weight, None, None


@dataclass(frozen=True)
class _Rows:
    """Those rows of one sample that a gradient reaches.

    Attributes:
        query: (H, r, d), scaled; ``grad``: (H, r, d) of what attention gave.
        highest, total, mean: (H, r) of :class:`FusedWeightedAttention`; the mean over the keys of
            what the gradient says of their values.
    """

    query: Tensor
    grad: Tensor
    highest: Tensor
    total: Tensor
    mean: Tensor


@dataclass(frozen=True)
class _Keys:
    """Some keys of one sample, without gaps, as some of its rows see them.

    Attributes:
        place: (n,) int64, rising; ``key``, ``value``: (H, n, d).
        seen: (h or 1, r, n) bool, False for a row's own key too.
        bias: (h or 1, r, n) to add to the logits, or None.
    """

    place: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, sample: int, chosen: Tensor, key: Tensor, value: Tensor, mask: Tensor, row: Tensor
    ) -> _Keys:
        """Those of a sample that are chosen (L,), for its rows ``row`` (r,), whose mask is (h or 1,
        r, L).
        """
        place = chosen.nonzero()[:, 0]
        mask = mask.index_select(-1, place)
        seen = visible_keys(mask) & (row[:, None] != place)
        bias = None if mask.dtype == torch.bool else mask
        k, v = (x[sample].index_select(1, place) for x in (key, value))
        return cls(place, k, v, seen, bias)

    def blocks(self) -> Iterator[tuple[slice, slice, int]]:
        """Rows, heads and how many keys: none behind those is seen."""
        length, cpu = self.seen.shape[1], self.key.device.type == "cpu"
        high = max(1, min(length, _CPU_ROWS if cpu else _GPU_ROWS))
        numbers = _CPU_NUMBERS if cpu else _GPU_NUMBERS
        wide = max(1, numbers // (high * max(1, len(self.place))))
        for row in range(0, length, high):
            rows = slice(row, min(row + high, length))
            reached = self.seen[:, rows].flatten(0, 1).any(0).nonzero()
            n = int(reached[-1]) + 1 if len(reached) else 0
            for head in range(0, len(self.key), wide):
                yield rows, slice(head, head + wide), n

    def part(self, rows: slice, heads: slice, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is seen (h or 1, r, n), keys and values (h, n, d)."""
        return _of(self.seen, rows, heads, n), self.key[heads, :n], self.value[heads, :n]

    def biased(self, logits: Tensor, rows: slice, heads: slice, n: int) -> Tensor:
        """Logits (h, r, n) in float32, the bias of the mask added."""
        logits = logits.float()
        return logits if self.bias is None else logits.add_(_of(self.bias, rows, heads, n))


def _way_back(
    rows: _Rows, keys: _Keys, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the keys' weights (n,), and of the rows' queries, the keys and the values: these
    are zero for keys that weigh nothing (``weight`` None).
    """
    to_weight = rows.total.new_zeros(len(keys.place))
    to_query, to_key, to_value = (torch.zeros_like(x) for x in (rows.query, keys.key, keys.value))
    for row, heads, n in keys.blocks():
        at = (heads, row)
        query, grad = rows.query[at], rows.grad[at]
        seen, key, value = keys.part(row, heads, n)
        logits = keys.biased(query @ key.transpose(-1, -2), row, heads, n)
        # Keys that do not count may lie above the maximum.
        logits = torch.minimum(logits, rows.highest[at][..., None])
        share = logits.sub_(rows.total[at][..., None]).clamp_(min=_NOTHING).exp_().mul_(seen)
        slope = (grad @ value.transpose(-1, -2)).float()
        slope.sub_(rows.mean[at][..., None]).mul_(share)
        to_weight[:n] += slope.sum((0, 1))
        if weight is not None:
            slope = slope.mul_(weight[:n]).to(query.dtype)
            to_query[at] += slope @ key
            to_key[heads, :n] += slope.transpose(-1, -2) @ query
            to_value[heads, :n] += share.mul_(weight[:n]).to(value.dtype).transpose(-1, -2) @ grad
    return to_weight, to_query, to_key, to_value


def _of_sample(mask: Tensor, sample: int) -> Tensor:
    """(H or 1, L, L) of a mask (B or 1, H or 1, L, L)."""
    return mask[sample if len(mask) > 1 else 0]


def _of(table: Tensor, rows: slice, heads: slice, n: int) -> Tensor:
    """(h or 1, r, n) of a table (H or 1, L, keys)."""
    return table[heads if len(table) > 1 else slice(None), rows, :n]


def _own_logits(scaled: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """(B, H, L) float32 of each token with itself, the least number where it is hidden."""
    own = (scaled * key).sum(-1).float()
    diagonal = mask.diagonal(dim1=-2, dim2=-1)
    if mask.dtype != torch.bool:
        own = own + diagonal
    return own.masked_fill(~visible_keys(diagonal), torch.finfo(own.dtype).min)
