"""Raters, ranks and recycling by density peaks (SparseVLM, Zhang et al., 2025, §3).

Shapes: ``B`` batch, ``V`` visual tokens, ``T`` text rows, ``P`` pruned tokens to recycle, ``C``
clusters of the sample that has most, ``D`` hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_patch.maths.indexing import gather_tokens, local_index, pack, top_k_mask

_HELD = 2**22  # numbers that are made of distances at a time


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
    # Twice the product, and symmetric however it is rounded.
    product = product + product.transpose(1, 2)
    squared = (square[:, :, None] + square[:, None]).sub_(product).clamp_(min=0).div_(width)
    del product
    place = torch.arange(size, device=x.device)
    squared.diagonal(dim1=1, dim2=2).zero_()
    # Only the distances are held whole, and what is made of them by some rows at a time.
    parts = place.split(max(1, _HELD // (batch * size)))

    def others(part: Tensor) -> Tensor:
        return valid[:, part, None] & valid[:, None]

    log_density = torch.cat(
        [
            _log_density(squared[:, part], others(part) & (part[:, None] != place), neighbours)
            for part in parts
        ],
        dim=1,
    )
    apart = torch.cat(
        [_separation(squared, log_density, part, others(part)) for part in parts], dim=1
    )
    score = log_density + 0.5 * apart.log()
    centre = top_k_mask(score, valid, counts)
    nearest = torch.cat(
        [squared[:, part].masked_fill(~centre[:, None], torch.inf).argmin(2) for part in parts],
        dim=1,
    )
    nearest = torch.where(centre, place, nearest)
    return torch.where(valid & centre.any(1, keepdim=True), nearest, -1)


def _log_density(squared: Tensor, known: Tensor, neighbours: int) -> Tensor:
    """Return, as (B, R), minus the mean squared distance of rows to their nearest neighbours.

    Args:
        squared, known: (B, R, P) squared distances, and where they are those of two tokens.
        neighbours: how many nearest tokens count.
    """
    number = min(neighbours, squared.shape[2])
    near = squared.masked_fill(~known, torch.inf).topk(number, dim=2, largest=False).values
    finite = near.isfinite()
    return -near.masked_fill(~finite, 0.0).sum(2) / finite.sum(2).clamp(min=1)


def _separation(squared: Tensor, log_density: Tensor, part: Tensor, both: Tensor) -> Tensor:
    """Return, as (B, R), the squared distance to the nearest denser token, or to the farthest.

    Args:
        squared: (B, P, P) of all tokens.
        log_density: (B, P).
        part: (R,) int64, the tokens.
        both: (B, R, P) bool, where a distance is that of two tokens.
    """
    own, place = log_density[:, part, None], torch.arange(squared.shape[1], device=part.device)
    denser = log_density[:, None] > own
    # Of two equally dense tokens the earlier one counts as denser.
    denser |= (log_density[:, None] == own) & (place < part[:, None])
    apart = squared[:, part].masked_fill(~(denser & both), torch.inf).amin(2)
    farthest = squared[:, part].masked_fill(~both, 0.0).amax(2)
    return torch.where(apart.isfinite(), apart, farthest)


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
    batch, clusters = slot.shape
    # The row of each token's centre; a token of no cluster adds 0 to the first row.
    joins = (centre >= 0) & (clusters > 0)
    row = local_index(slot, valid, centre.shape[1]).gather(1, centre.clamp(min=0))
    row = row.masked_fill(~joins, 0)
    share = joins.float()
    if mean:
        size = share.new_zeros(batch, max(clusters, 1)).scatter_add(1, row, share)
        share = share / size.gather(1, row).clamp(min=1)
    weight = share.new_zeros(batch, clusters * columns)
    if clusters:
        # A token of no cluster may share its place with another, so its 0 is added, not written.
        weight.scatter_add_(1, row * columns + index, share)
    weight = weight.view(batch, clusters, columns)
    return gather_tokens(index, slot), valid, weight
