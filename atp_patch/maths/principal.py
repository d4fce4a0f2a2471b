"""Principal directions among tokens (PruneSID §3.2)."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor
from torch.nn.functional import pad

_ITERATIONS = 2
# Smaller shares of the largest variance, and smaller variances of one number, are rounding.
_NEGLIGIBLE, _EQUAL = 1e-6, 1e-12


def principal_loadings(features: Tensor, valid: Tensor, number: int) -> Tensor:
    """Return how much each token contributes to the principal directions of its image.

    With ``X`` the sigmoid of the features minus its mean over the tokens, and its decomposition
    ``X^T = U S V^T``, these are the absolute values of ``V`` for the largest singular values
    (PruneSID eq. 1 and 2). They are approximated as usual by subspace iteration, which starts here
    from cosines of rising frequency instead of random vectors, so that it gives the same every
    time.

    Args:
        features, valid: (G, n, D), and (G, n) bool.
        number: how many directions.

    Returns:
        (G, n, number) float32; 0 for padding, and for directions beyond the rank. They are rounded
        to five decimals, so that equal tokens have equal loadings.
    """
    x = features.float().sigmoid().masked_fill(~valid[..., None], 0.0)
    mean = x.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    x = (x - mean).masked_fill(~valid[..., None], 0.0)
    size = x.shape[2]
    place = (torch.arange(size, device=x.device) + 0.5) / size
    start = (pi * place[:, None] * torch.arange(1, number + 1, device=x.device)).cos()
    basis = torch.linalg.qr(x @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(x @ (x.transpose(1, 2) @ basis)).Q
    within = basis.transpose(1, 2) @ x
    variance, rotation = torch.linalg.eigh(within @ within.transpose(1, 2))
    variance, rotation = variance.flip(1), rotation.flip(2)
    loadings = (basis @ rotation).abs()
    smallest = torch.maximum(_NEGLIGIBLE * variance[:, 0], _EQUAL * size * valid.sum(1))
    beyond = variance <= smallest[:, None]
    loadings = loadings.masked_fill(beyond[:, None] | ~valid[..., None], 0.0)
    return pad(loadings.round(decimals=5), (0, number - loadings.shape[2]))
