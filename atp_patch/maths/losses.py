"""Budget-constrained training (ATP-LLaVA eq. 12-13). ``B`` samples, counts may be soft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def atp_loss(counts: Sequence[Tensor], totals: Tensor, layers: Sequence[int]) -> Tensor:
    """L_atp of eq. 12: tokens left as a share, weighted by depth, summed over pruning layers.

    Args:
        counts: (B,) float, tokens left after each pruning layer.
        totals: (B,) float, tokens before any pruning, above 0.
        layers: the pruning layers.

    Returns:
        A scalar, averaged over the samples.
    """
    shares = [layer * (count / totals) for layer, count in zip(layers, counts, strict=True)]
    return torch.stack(shares).sum(0).mean()


def layer_averages(
    counts: Sequence[Tensor], totals: Tensor, layers: Sequence[int], num_layers: int
) -> Tensor:
    """(B,) tokens of each sample averaged over all decoder layers; their mean is eq. 13's ``Nbar``.

    Args:
        counts, totals, layers: as in :func:`atp_loss`.
    """
    ends = [*layers[1:], num_layers]
    spans = [end - start for start, end in zip(layers, ends, strict=True)]
    kept = sum((span * count.float() for span, count in zip(spans, counts, strict=True)))
    return (kept + layers[0] * totals) / num_layers


def target_loss(averages: Tensor, total: Tensor, target: float, kind: str) -> Tensor:
    """L_target of eq. 13: how far the average of tokens is from the budget.

    A batch's average is off by chance too, by the more the more its samples differ, so that its
    square also asks samples to be alike: its mean is the square for all data plus the samples'
    variance over B. "unbiased" leaves the variance out.

    Args:
        averages: (B,) of :func:`layer_averages`; ``total``: tokens before any pruning.
        target: ``N_target``, in tokens.
        kind: "paper": ``|Nbar - N_target|``; "smooth": ``500 ((Nbar - N_target) / Lv)^2``, whose
            gradient vanishes at the target and does not grow with the resolution; "unbiased": the
            same with the square replaced by the mean of ``(N_i - N_target) (N_j - N_target)`` over
            all pairs of different samples, which may be negative (of one sample: "smooth").

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
