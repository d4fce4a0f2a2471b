"""Raters, ranks and recycling by density peaks (SparseVLM, Zhang et al., 2025, §3).

Shapes: ``B`` batch, ``V`` visual tokens, ``T`` text rows, ``P`` pruned tokens to recycle, ``C``
clusters of the sample that has most, ``D`` hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_patch.maths.indexing import gather_tokens, pack, top_k_mask


def raters(visual: Tensor, visual_valid: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
    """Return the text tokens that the image is about: those of at least average relevance.

    The relevance of a text token is its share in ``softmax(H_v H_t^T)``, the softmax of each visual
    token over the text tokens, averaged over the visual tokens.

    Args:
        visual, visual_valid: (B, V, D) embeddings as they entered the decoder, and (B, V) bool.
        text, text_valid: (B, T, D) embeddings of the text, and (B, T) bool.

    Returns:
        (B, T) bool, at least one token True in each sample with text.
    """
    if text_valid.shape[1] == 0:
        return text_valid
    logits = visual.float() @ text.float().transpose(1, 2)
    shares = logits.masked_fill(~text_valid[:, None], torch.finfo(torch.float32).min).softmax(-1)
    shares = shares.masked_fill(~visual_valid[..., None], 0.0).sum(1)
    relevance = shares / visual_valid.sum(1, keepdim=True).clamp(min=1)
    relevance = relevance.masked_fill(~text_valid, 0.0)
    average = relevance.sum(1, keepdim=True) / text_valid.sum(1, keepdim=True).clamp(min=1)
    # Where all are alike, rounding could leave none of them.
    best = relevance >= relevance.amax(1, keepdim=True)
    return text_valid & ((relevance >= average) | best)


def attention_rank(rows: Tensor, tolerance: float) -> Tensor:
    """Return, as (B,) int64, the rank of each sample's matrix of attention.

    Args:
        rows: (B, T, V) attention; rows and columns of zeros do not change the rank.
        tolerance: singular values of no more than this share of the largest count as zero.
    """
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
    values = torch.linalg.svdvals(rows.float())
    return (values > tolerance * values[:, :1]).sum(1)


def density_peaks(x: Tensor, valid: Tensor, counts: Tensor, neighbours: int) -> Tensor:
    """Cluster tokens around density peaks, which are dense and far from any denser token.

    The density of a token is ``exp(-mean squared distance)`` to its nearest ``neighbours``. Its
    separation is the distance to the nearest denser token, or to the farthest token for the densest
    one. The tokens with the highest product of both are the centres, and every other token joins
    the nearest centre. Squared distances are means over the hidden size. Products are compared by
    their logarithms, because ``exp`` of a large model's distances is 0.

    Args:
        x, valid: (B, P, D) tokens, and (B, P) bool.
        counts: (B,) int64 clusters of each sample, no more than it has valid tokens.
        neighbours: how many nearest tokens the density is measured by.

    Returns:
        (B, P) int64, the centre that each token joins (a centre joins itself); -1 where there is
        none.
    """
    batch, size, width = x.shape
    if size == 0:
        return torch.zeros(batch, 0, dtype=torch.long, device=x.device)
    # A shift changes no difference, and keeps the products small, so that they are rounded less.
    count = valid.sum(1)[:, None, None].clamp(min=1)
    centred = x.float().masked_fill(~valid[..., None], 0.0)
    centred = centred - centred.sum(1, keepdim=True) / count
    square = centred.square().sum(-1)
    product = centred @ centred.transpose(1, 2)
    product = product + product.transpose(
        1, 2
    )  # twice the product, and symmetric however it is rounded
    squared = (square[:, :, None] + square[:, None] - product).clamp(min=0) / width
    both = valid[:, :, None] & valid[:, None]
    own = torch.eye(size, dtype=torch.bool, device=x.device)
    squared = squared.masked_fill(own, 0.0)
    near = squared.masked_fill(own | ~both, torch.inf).sort(dim=2).values[:, :, :neighbours]
    known = near.isfinite()
    log_density = -near.masked_fill(~known, 0.0).sum(2) / known.sum(2).clamp(min=1)
    place = torch.arange(size, device=x.device)
    denser = log_density[:, None] > log_density[:, :, None]
    # Of two equally dense tokens the earlier one counts as denser.
    denser |= (log_density[:, None] == log_density[:, :, None]) & (place[None] < place[:, None])
    apart = squared.masked_fill(~(denser & both), torch.inf).amin(2)
    farthest = squared.masked_fill(~both, 0.0).amax(2)
    apart = torch.where(apart.isfinite(), apart, farthest)
    score = log_density + 0.5 * apart.log()
    centre = top_k_mask(score, valid, counts)
    nearest = squared.masked_fill(~centre[:, None].expand_as(squared), torch.inf).argmin(2)
    nearest = torch.where(centre, place, nearest)
    return torch.where(valid & centre.any(1, keepdim=True), nearest, -1)


def cluster_weights(
    index: Tensor, centre: Tensor, columns: int, *, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights that make one token of each cluster.

    Args:
        index: (B, P) int64, the column of each token among ``columns``.
        centre: (B, P) int64 as :func:`density_peaks` gives it.
        columns: how many columns the weights have.
        mean: take the mean of a cluster's tokens instead of their sum, which is the paper's.

    Returns:
        column (B, C) int64 of each centre, valid (B, C) bool, and weight (B, C, columns) float32.
    """
    place = torch.arange(centre.shape[1], device=centre.device)
    slot, valid = pack(centre == place)
    member = (centre[:, None] == slot[..., None]) & valid[..., None]
    share = member.float()
    if mean:
        share = share / share.sum(2, keepdim=True).clamp(min=1)
    weight = share.new_zeros(*share.shape[:2], columns)
    # A token of no cluster may share its column with another, so its 0 is added, not written.
    weight = weight.scatter_add(2, index[:, None].expand_as(share), share)
    return gather_tokens(index, slot), valid, weight
