"""Losses of training under a budget (ATP-LLaVA eq. 12-13). ``B`` samples; counts may be soft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def atp_loss(counts: Sequence[Tensor], totals: Tensor, layers: Sequence[int]) -> Tensor:
    """Return L_atp of eq. 12: the shares of tokens left, weighted by depth, summed over layers.

    Args:
        counts: for each pruning layer (B,) float, the tokens left after it.
        totals: (B,) float, the tokens before any pruning, above 0.
        layers: the pruning layers.

    Returns:
        A scalar, averaged over the samples.
    """
    shares = [layer * (count / totals) for layer, count in zip(layers, counts, strict=True)]
    return torch.stack(shares).sum(0).mean()


def layer_averages(
    counts: Sequence[Tensor], totals: Tensor, layers: Sequence[int], num_layers: int
) -> Tensor:
    """Return (B,) float: tokens averaged over all decoder layers; their mean is ``Nbar`` of eq. 13.

    Args:
        counts, totals, layers: as of :func:`atp_loss`.
        num_layers: how many layers the decoder has.
    """
    ends = [*layers[1:], num_layers]
    spans = [end - start for start, end in zip(layers, ends, strict=True)]
    kept = sum((span * count.float() for span, count in zip(spans, counts, strict=True)))
    return (kept + layers[0] * totals) / num_layers


def target_loss(averages: Tensor, total: Tensor, target: float, kind: str) -> Tensor:
    """Return L_target of eq. 13: the distance between the average number of tokens and the budget.

    The average of a batch also differs from the target by chance, and more so where its samples
    differ more. So its square is on average the square for all data plus the samples' variance
    divided by B, and asks samples to be alike. "unbiased" leaves the variance out.

    Args:
        averages: (B,) float as :func:`layer_averages` gives it.
        total: how many tokens there are before any pruning.
        target: ``N_target``, in tokens.
        kind: "paper": ``|Nbar - N_target|``; "smooth": ``500 ((Nbar - N_target) / Lv)^2``, whose
            gradient vanishes at the target and does not grow with the resolution; "unbiased": the
            same with the square replaced by the mean of ``(N_i - N_target) (N_j - N_target)`` over
            all pairs of different samples, which may be negative. One sample alone gets the
            "smooth" loss.

    Returns:
        A scalar.
    """
    if kind == "paper":
        return (averages.mean() - target).abs()
    if kind not in ("smooth", "unbiased"):
        raise ValueError(f"unknown target loss {kind!r}: paper, smooth or unbiased")
    off = (averages - target) / total
    samples = off.numel()
    if kind == "smooth" or samples == 1:
        return 500 * off.mean().square()
    return 500 * (off.sum().square() - off.square().sum()) / (samples * (samples - 1))
