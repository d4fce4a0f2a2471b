"""Comparing scores with thresholds: hard decisions, soft masks, thresholds that meet a count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_ABOVE = 2.0  # greater than every score: ranks and spatial scores are at most 1


def hard_keep(
    s_redundant: Tensor,
    s_spatial: Tensor,
    theta_redundant: Tensor,
    theta_spatial: Tensor,
    valid: Tensor,
) -> Tensor:
    """Return which tokens stay: those of which either score reaches its threshold (eq. 9-11).

    Args:
        s_redundant, s_spatial, valid: (B, V) scores, and bool.
        theta_redundant, theta_spatial: (B,) thresholds.

    Returns:
        (B, V) bool, False in invalid slots.
    """
    by_redundant = s_redundant >= theta_redundant[:, None]
    by_spatial = s_spatial >= theta_spatial[:, None]
    return (by_redundant | by_spatial) & valid


def soft_mask(
    s_redundant: Tensor,
    s_spatial: Tensor,
    theta_redundant: Tensor,
    theta_spatial: Tensor,
    valid: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """Return ATP-LLaVA's eq. 9-11: ``max(sigmoid((S_r - theta_r) T), sigmoid((S_s - theta_s) T))``.

    The masks of earlier pruning layers are not multiplied in. With the paper's ``T = 1e6`` the
    gradient vanishes almost everywhere; :func:`straight_through_mask` has one that does not.

    Args:
        s_redundant, s_spatial, valid: (B, V).
        theta_redundant, theta_spatial: (B,).
        temperature: ``T``, the slope of the sigmoids.

    Returns:
        (B, V) float32, 0 in invalid slots.
    """

    def one(scores: Tensor, theta: Tensor) -> Tensor:
        # Invalid slots are cleared before the sigmoid: a NaN would reach the thresholds' gradient.
        margin = scores.float().masked_fill(~valid, 0.0) - theta.float()[:, None]
        return (margin * temperature).sigmoid()

    soft = torch.maximum(one(s_redundant, theta_redundant), one(s_spatial, theta_spatial))
    return soft.masked_fill(~valid, 0.0)


def straight_through_mask(
    s_redundant: Tensor,
    s_spatial: Tensor,
    theta_redundant: Tensor,
    theta_spatial: Tensor,
    valid: Tensor,
    slope: float | Tensor,
) -> Tensor:
    """Return ATP-LLaVA's eq. 9-11 with the decision of inference and the gradient of a soft mask.

    The forward pass is exactly :func:`hard_keep`, and the backward pass that of :func:`soft_mask`
    with temperature ``slope``.

    Args:
        s_redundant, s_spatial, valid: (B, V).
        theta_redundant, theta_spatial: (B,).
        slope: temperature of the backward pass.

    Returns:
        (B, V) float32, each entry exactly 0 or 1.
    """
    scores_and_thetas = (s_redundant, s_spatial, theta_redundant, theta_spatial)
    soft = soft_mask(*scores_and_thetas, valid, slope)
    return hard_keep(*scores_and_thetas, valid).float() + (soft - soft.detach())


def budget_thresholds(
    s_redundant: Tensor, s_spatial: Tensor, valid: Tensor, counts: Tensor, spatial_share: float
) -> tuple[Tensor, Tensor]:
    """Return thresholds at which :func:`hard_keep` keeps exactly ``counts`` tokens of each sample.

    Args:
        s_redundant: (B, V) float32, distinct within a sample (ranks).
        s_spatial: (B, V) float32; a token with score 0 is never taken by its spatial score.
        valid: (B, V) bool.
        counts: (B,) int64, at most the valid tokens of each sample.
        spatial_share: about this share of a count is taken by spatial score, and the rest by
            redundant score among the others. Equal scores in ``s_spatial`` (strided grids) stay
            together, so the spatial part may be smaller than that, and never larger.

    Returns:
        theta_redundant and theta_spatial, (B,) float32, halfway between neighbouring scores.
    """
    if s_redundant.shape[1] == 0:
        empty = s_redundant.new_full(counts.shape, _ABOVE)
        return empty, empty.clone()
    candidates = valid & (s_spatial > 0)
    wanted = (counts * spatial_share).round().long()
    # The value of each candidate, and how many candidates reach it; equal ones count together.
    rising = s_spatial.masked_fill(~candidates, -torch.inf).sort(1).values
    order = rising.flip(1)
    reach = order.shape[1] - torch.searchsorted(rising, order.contiguous())
    allowed = torch.isfinite(order) & (reach <= wanted[:, None])
    taken = torch.where(allowed, reach, 0).amax(1)
    theta_spatial = _between(order, taken, 0.0)  # above 0, so that no score of 0 reaches it
    spatial = candidates & (s_spatial >= theta_spatial[:, None])
    rest = valid & ~spatial
    ranked = s_redundant.masked_fill(~rest, -torch.inf).sort(1, descending=True).values
    theta_redundant = _between(ranked, counts - taken, -1.0)
    return theta_redundant, theta_spatial


def _between(descending: Tensor, count: Tensor, floor: float) -> Tensor:
    """Return thresholds that exactly the first ``count`` (B,) of each row (V) of scores reach.

    Returns:
        (B,), each halfway to the next score, or to ``floor`` where there is none.
    """
    # Kernels do the padding: a tensor made from Python numbers would wait for the device.
    padded = pad(pad(descending.clamp(min=floor), (1, 0), value=_ABOVE), (0, 1), value=floor)
    above = padded.gather(1, count[:, None])[:, 0]
    below = padded.gather(1, count[:, None] + 1)[:, 0]
    return (above + below) / 2
