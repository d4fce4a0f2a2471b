"""Attention scores of visual tokens, from post-rotary queries and keys alone (ATP-LLaVA eq. 3-4).

Shapes: ``B`` batch, ``H`` query heads, ``Hk`` key/value heads (query head ``h`` reads key head
``h // (H / Hk)``), ``V`` packed visual tokens, ``T`` packed text rows, ``K`` keys, ``d`` head size.
No attention map over all tokens is ever built.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from atp_patch.maths.indexing import descending_rank

# How many elements the largest intermediate tensor may have. On a CPU a larger one does not fit the
# caches, and its memory is mapped anew each time; on other devices many small steps cost more.
_HELD_ON_CPU, _HELD = 2**22, 2**28


def _sample_slices(like: Tensor, elements: int) -> Iterator[slice]:
    """Return slices of the samples that are computed together.

    Args:
        like: a tensor with the batch in front, on the device that computes.
        elements: how many elements the intermediate tensor of one sample has.
    """
    held = _HELD_ON_CPU if like.device.type == "cpu" else _HELD
    count = max(held // max(elements, 1), 1)
    return (slice(start, start + count) for start in range(0, like.shape[0], count))


def self_scores(
    query: Tensor,
    key: Tensor,
    valid: Tensor,
    scaling: float,
    *,
    causal: bool = False,
    per_head: bool = False,
) -> Tensor:
    """Return S_self of eq. 3: the mean attention logit that visual queries give a visual token.

    The logits are linear in the queries, so their mean is the logit of the mean query, which costs
    O(V d). They are taken before any softcap, which would make it O(V^2 d).

    Args:
        query, key: (B, H, V, d) and (B, Hk, V, d) of the visual tokens.
        valid: (B, V) bool.
        scaling: the factor of the logits, usually ``d ** -0.5``.
        causal: average only over the queries that causality lets see the token, which are its own
            and later ones.
        per_head: give the scores of each head instead of their mean.

    Returns:
        (B, V) float32, 0 in invalid slots; (B, H, V) per head.
    """
    parts = _sample_slices(query, query[0].numel())
    sums = [_summed_logits(query[b], key[b], valid[b], causal, per_head) for b in parts]
    seen_by = valid.flip(1).cumsum(1).flip(1) if causal else valid.sum(1, keepdim=True)
    logits = torch.cat(sums)
    if per_head:
        seen_by, valid = seen_by[:, None], valid[:, None]
    else:
        scaling = scaling / query.shape[1]
    return (logits / seen_by.clamp(min=1) * scaling).masked_fill(~valid, 0.0)


def _summed_logits(
    query: Tensor, key: Tensor, valid: Tensor, causal: bool, per_head: bool
) -> Tensor:
    """Return (B, V) float32: q k summed over visual queries and heads; (B, H, V) over queries
    alone.
    """
    groups = query.shape[1] // key.shape[1]
    queries = query.masked_fill(~valid[:, None, :, None], 0.0)
    if per_head:
        total = queries.sum(2, keepdim=True, dtype=torch.float32)
        if causal:
            total = queries.float().flip(2).cumsum(2).flip(2)
        return (total * key.float().repeat_interleave(groups, 1)).sum(-1)
    # Heads that share a key head can be summed before the product.
    if causal:
        queries = rearrange(queries.float(), "b (k g) v d -> b k g v d", g=groups).sum(2)
        return (queries.flip(2).cumsum(2).flip(2) * key.float()).sum((1, 3))
    total = queries.sum(2, dtype=torch.float32)
    total = rearrange(total, "b (k g) d -> b k g d", g=groups).sum(2)
    return (key.float() @ total[..., None]).sum(1)[..., 0]


def cross_scores(
    query: Tensor,
    key: Tensor,
    row_valid: Tensor,
    visual_index: Tensor,
    visual_valid: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    renormalise: bool = False,
    per_head: bool = False,
    chunk_rows: int = 64,
) -> Tensor:
    """Return S_cross of eq. 4: the mean attention probability that text rows give a visual token.

    Args:
        query: (B, H, T, d) of the text rows.
        key: (B, Hk, K, d), all keys that these rows may see.
        row_valid: (B, T) bool, True for the rows that count.
        visual_index, visual_valid: (B, V) int64 places of the visual tokens among the keys, and
            bool.
        scaling: the factor of the logits.
        mask: the attention mask, broadcastable to (B, H, T, K), as :func:`visible_keys` reads it. A
            float mask is added to the logits too.
        softcap: the bound below which a tanh brings the logits (Gemma 2).
        sinks: (H,) float, a logit of each head that counts in the sums of its softmax and for no
            token (gpt-oss).
        renormalise: make each row of each head sum to 1 over the visual tokens before averaging.
        per_head: give the scores of each head instead of their mean.
        chunk_rows: how many rows' probabilities are held at a time.

    Returns:
        (B, V) float32, or (B, H, V) per head. It is 0 in invalid slots and for a sample without a
        row that counts; a row that sees no key adds 0.
    """
    how = {"softcap": softcap, "sinks": sinks, "renormalise": renormalise, "per_head": per_head}
    parts = _in_parts(
        query, key, row_valid, visual_index, visual_valid, scaling, mask, chunk_rows, how
    )
    totals = [reduce(torch.add, (part.sum(-2) for part in of_samples)) for of_samples in parts]
    rows = row_valid.sum(1, keepdim=True).clamp(min=1)
    return torch.cat(totals) / (rows[:, None] if per_head else rows)


def cross_rows(
    query: Tensor,
    key: Tensor,
    row_valid: Tensor,
    visual_index: Tensor,
    visual_valid: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    renormalise: bool = False,
    per_head: bool = False,
) -> Tensor:
    """Return the attention probability that each text row gives each visual token.

    The arguments are those of :func:`cross_scores`.

    Returns:
        (B, T, V) float32, averaged over heads, or (B, H, T, V) per head; 0 for invalid rows and in
        invalid slots.
    """
    how = {"softcap": softcap, "sinks": sinks, "renormalise": renormalise, "per_head": per_head}
    rows = max(query.shape[2], 1)
    parts = _in_parts(query, key, row_valid, visual_index, visual_valid, scaling, mask, rows, how)
    return torch.cat([part for of_samples in parts for part in of_samples])


def _in_parts(
    query: Tensor,
    key: Tensor,
    row_valid: Tensor,
    visual_index: Tensor,
    visual_valid: Tensor,
    scaling: float,
    mask: Tensor | None,
    chunk_rows: int,
    how: dict[str, Any],
) -> Iterator[Iterator[Tensor]]:
    """Return :func:`_rows` of ``chunk_rows`` rows at a time, for each slice of samples in turn."""
    _, heads, rows, _ = query.shape
    per_row = heads * key.shape[2]

    def of_samples(b: slice) -> Iterator[Tensor]:
        keys = key[b].float()
        for start in range(0, max(rows, 1), chunk_rows):
            part = slice(start, start + chunk_rows)
            yield _rows(
                query[b, :, part],
                keys,
                row_valid[b, part],
                visual_index[b],
                visual_valid[b],
                scaling,
                mask=_mask_of(mask, b, part),
                **how,
            )

    for b in _sample_slices(query, max(key[0].numel(), per_row * min(rows, chunk_rows))):
        yield of_samples(b)


def _mask_of(mask: Tensor | None, samples: slice, rows: slice) -> Tensor | None:
    """Return the mask (B or 1, H or 1, T or 1, K) of some samples and rows."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    mask = mask if mask.shape[0] == 1 else mask[samples]
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def _rows(
    query: Tensor,
    key: Tensor,
    row_valid: Tensor,
    visual_index: Tensor,
    visual_valid: Tensor,
    scaling: float,
    *,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    renormalise: bool,
    per_head: bool,
) -> Tensor:
    """Return :func:`cross_rows` of samples that are computed together."""
    batch, heads, rows, _ = query.shape
    groups = heads // key.shape[1]
    # Products are float32 too: float16 overflows before scaling, and bfloat16 rounds a logit of 16
    # to sixteenths.
    grouped = rearrange(query.float() * scaling, "b (k g) t d -> b k (g t) d", g=groups)
    logits = grouped @ key.float().transpose(-1, -2)
    logits = rearrange(logits, "b k (g t) n -> b (k g) t n", g=groups)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lowest = torch.finfo(torch.float32).min
    if mask is not None:
        if mask.dtype != torch.bool:
            logits = logits + mask
        logits = logits.masked_fill_(~visible_keys(mask), lowest)
    columns = visual_index[:, None, None, :].expand(batch, heads, rows, -1)
    visual = logits.gather(3, columns).masked_fill(~visual_valid[:, None, None, :], lowest)
    if renormalise:
        # This is a softmax over the visual tokens alone: a quotient of probabilities would be 0 / 0
        # where the text gets all attention.
        seen = visual.softmax(-1)
    else:
        if sinks is not None:
            sink = sinks.to(logits)[None, :, None, None].expand(batch, -1, rows, 1)
            logits = torch.cat([logits, sink], dim=-1)
        seen = logits.softmax(-1).gather(3, columns)
    seen = seen.masked_fill(visual == lowest, 0.0)
    row_valid = row_valid[..., None]
    if per_head:
        return seen.masked_fill(~row_valid[:, None], 0.0)
    return seen.mean(1).masked_fill(~row_valid, 0.0)


def visible_keys(mask: Tensor) -> Tensor:
    """Return where an attention mask lets a key be seen.

    A bool mask does so where it is True, and a float mask where it is greater than half of its
    dtype's least number.
    """
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def normalise_scores(scores: Tensor, valid: Tensor, mode: str) -> Tensor:
    """Bring a sample's scores to one scale.

    Args:
        scores, valid: (B, V).
        mode: "rank" gives (rank + 0.5) / n, from the worst to the best of the n valid tokens; these
            are distinct, and the earlier of equal scores is higher. "minmax" scales to [0, 1], and
            gives 0.5 where all are equal. "none" leaves the scores as they are.

    Returns:
        (B, V) float32, 0 in invalid slots.
    """
    scores = scores.float()
    if mode == "rank":
        count = valid.sum(1, keepdim=True)
        from_worst = count - 1 - descending_rank(scores, valid)
        scores = (from_worst + 0.5) / count.clamp(min=1)
    elif mode == "minmax":
        low = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        high = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        spread = high - low
        scaled = (scores - low) / torch.where(spread > 0, spread, 1.0)
        scores = torch.where(spread > 0, scaled, 0.5)
    elif mode != "none":
        raise ValueError(f"unknown score normalisation {mode!r}: rank, minmax or none")
    return scores.masked_fill(~valid, 0.0)


def standardise_scores(scores: Tensor, valid: Tensor) -> Tensor:
    """Return the scores of each sample with mean 0 and variance 1 over its valid tokens, for eq. 6.

    Args:
        scores, valid: (B, V).

    Returns:
        (B, V) float32, 0 in invalid slots and where all scores of a sample are equal.
    """
    count = valid.sum(1, keepdim=True).clamp(min=1)
    scores = scores.float().masked_fill(~valid, 0.0)
    centred = (scores - scores.sum(1, keepdim=True) / count).masked_fill(~valid, 0.0)
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * (variance + 1e-6).rsqrt()


def redundant_scores(
    s_self: Tensor, s_cross: Tensor, valid: Tensor, *, score: str, norm: str
) -> Tensor:
    """Return S_redundant: the mean of both scores (below eq. 4), or one of them alone.

    Args:
        s_self, s_cross, valid: (B, V).
        score: "mean", "cross" or "self".
        norm: a mode of :func:`normalise_scores`; a mean of ranks is ranked again, so that a
            threshold ``t`` prunes exactly a share ``t``.

    Returns:
        (B, V) float32, 0 in invalid slots.
    """
    if score == "self":
        return normalise_scores(s_self, valid, norm)
    if score == "cross":
        return normalise_scores(s_cross, valid, norm)
    if score != "mean":
        raise ValueError(f"unknown score {score!r}: mean, cross or self")
    both = (normalise_scores(s, valid, norm) for s in (s_self, s_cross))
    mean = sum(both) / 2
    assert isinstance(mean, Tensor)
    return normalise_scores(mean, valid, "rank") if norm == "rank" else mean
