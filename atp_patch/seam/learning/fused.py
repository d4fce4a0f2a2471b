"""Weighted attention for long sequences, in memory linear in the sequence.

The (L, L) tables are computed a few rows at a time, and computed again in the backward pass, so
that none is kept. Hidden keys and keys of weight 0 cost little: a block of rows reads no key behind
its last visible one, and keys of weight 0 are read in the backward pass alone, for the gradients of
their weights. Rows that no gradient reaches, as those of pruned tokens, are left out of the
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_patch.maths import visible_keys

# How many numbers the tables of one step hold: what fits a CPU's caches, or what fills a GPU.
_CPU_NUMBERS, _GPU_NUMBERS = 2**19, 2**26
_CPU_ROWS, _GPU_ROWS = 128, 1024
_NOTHING = -80.0  # a logit this far below the greatest adds nothing; smaller ones are slow in exp


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
        """Return the weighted mean of the values, and save what the backward pass needs of each
        row.
        """
        out = torch.empty_like(value)
        # For each row: the greatest logit of the keys that count, and the log of the sum.
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
        """Return the gradients of query, key, value and weight, those of keys that do not count
        included.
        """
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
    """The rows of one sample that a gradient reaches.

    Attributes:
        query: (H, r, d) queries times the scaling.
        grad: (H, r, d), the gradient of the attention's output.
        highest, total: (H, r) float32, the greatest logit and the log of the sum of exponentials.
        mean: (H, r) float32, the mean over the keys of the product of gradient and value.
    """

    query: Tensor
    grad: Tensor
    highest: Tensor
    total: Tensor
    mean: Tensor


@dataclass(frozen=True)
class _Keys:
    """Some keys of one sample, packed, as some of its rows see them.

    Attributes:
        place: (n,) int64 places in the sequence, rising.
        key, value: (H, n, d).
        seen: (h or 1, r, n) bool, False for a row's own key too.
        bias: (h or 1, r, n), what is added to the logits, or None.
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
        """Return the chosen keys of a sample, for some of its rows.

        Args:
            sample: the number of the sample.
            chosen: (L,) bool.
            key, value: (B, H, L, d).
            mask: (h or 1, r, L), the mask of these rows.
            row: (r,) int64 places of the rows.
        """
        place = chosen.nonzero()[:, 0]
        mask = mask.index_select(-1, place)
        seen = visible_keys(mask) & (row[:, None] != place)
        bias = None if mask.dtype == torch.bool else mask
        k, v = (x[sample].index_select(1, place) for x in (key, value))
        return cls(place, k, v, seen, bias)

    def blocks(self) -> Iterator[tuple[slice, slice, int]]:
        """Return blocks of rows and heads, each with the number of keys in front that its rows may
        see.
        """
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
        """Return a block's part of ``seen`` (h or 1, r, n), and its keys and values (h, n, d)."""
        return _of(self.seen, rows, heads, n), self.key[heads, :n], self.value[heads, :n]

    def biased(self, logits: Tensor, rows: slice, heads: slice, n: int) -> Tensor:
        """Return the logits (h, r, n) in float32 with the bias of the mask."""
        logits = logits.float()
        return logits if self.bias is None else logits.add_(_of(self.bias, rows, heads, n))


def _way_back(
    rows: _Rows, keys: _Keys, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the keys' weights (n,), of the queries, of the keys and of the
    values.

    The last three are zero for keys of weight 0, for which ``weight`` is None.
    """
    to_weight = rows.total.new_zeros(len(keys.place))
    to_query, to_key, to_value = (torch.zeros_like(x) for x in (rows.query, keys.key, keys.value))
    for row, heads, n in keys.blocks():
        at = (heads, row)
        query, grad = rows.query[at], rows.grad[at]
        seen, key, value = keys.part(row, heads, n)
        logits = keys.biased(query @ key.transpose(-1, -2), row, heads, n)
        # The logits of keys that do not count may be greater than the maximum.
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
    """Return one sample's part (H or 1, L, L) of a mask (B or 1, H or 1, L, L)."""
    return mask[sample if len(mask) > 1 else 0]


def _of(table: Tensor, rows: slice, heads: slice, n: int) -> Tensor:
    """Return a block's part (h or 1, r, n) of a table (H or 1, L, keys)."""
    return table[heads if len(table) > 1 else slice(None), rows, :n]


def _own_logits(scaled: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Return (B, H, L) float32: each token's logit with itself, or the smallest number where it is
    hidden.
    """
    own = (scaled * key).sum(-1).float()
    diagonal = mask.diagonal(dim1=-2, dim2=-1)
    if mask.dtype != torch.bool:
        own = own + diagonal
    return own.masked_fill(~visible_keys(diagonal), torch.finfo(own.dtype).min)
