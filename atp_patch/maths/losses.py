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


def batch_average(
    counts: Sequence[Tensor], totals: Tensor, layers: Sequence[int], num_layers: int
) -> Tensor:
    """``Nbar`` of eq. 13: tokens averaged over all decoder layers and the batch, a scalar.

    Args:
        counts, totals, layers: as in :func:`atp_loss`.
    """
    ends = [*layers[1:], num_layers]
    spans = [end - start for start, end in zip(layers, ends, strict=True)]
    means = (count.float().mean() for count in counts)
    kept = sum((span * mean for span, mean in zip(spans, means, strict=True)))
    return (kept + layers[0] * totals.mean()) / num_layers


def target_loss(average: Tensor, total: Tensor, target: float, kind: str) -> Tensor:
    """L_target of eq. 13: how far the average of tokens is from the budget.

    Args:
        average: ``Nbar``, of :func:`batch_average`; ``total``: tokens before any pruning.
        target: ``N_target``, in tokens.
        kind: "paper": ``|Nbar - N_target|``; "smooth": ``500 ((Nbar - N_target) / Lv)^2``, whose
            gradient vanishes at the target and does not grow with the resolution.

    Returns:
        A scalar.
    """
    if kind == "paper":
        return (average - target).abs()
    if kind != "smooth":
        raise ValueError(f"unknown target loss {kind!r}: paper or smooth")
    return 500 * ((average - target) / total) ** 2
