"""Low-rank additions to the decoder's matrices (LoRA, Hu et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RANK = 8
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """A linear layer whose weight is fixed, plus a product of two small matrices.

    Args:
        fixed: the layer, without bias.
        rank: number of rows of ``down`` and of columns of ``up``.
    """

    def __init__(self, fixed: nn.Linear, rank: int) -> None:
        super().__init__()
        self.fixed = fixed.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, fixed.in_features) * fixed.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(fixed.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (fixed + up down)^T."""
        out: Tensor = self.fixed(x)
        return out + (x @ self.down.mT) @ self.up.mT


def add_low_rank(decoder: nn.Module, rank: int = RANK) -> dict[str, LowRank]:
    """Put low-rank additions into a decoder, whose output does not change yet.

    Returns:
        the additions by name, such as ``layers.0.self_attn.q_proj``.
    """
    found: dict[str, LowRank] = {}
    for name, module in list(decoder.named_modules()):
        for child, layer in list(module.named_children()):
            if child in MATRICES and isinstance(layer, nn.Linear):
                wrapped = LowRank(layer, rank)
                setattr(module, child, wrapped)
                found[f"{name}.{child}"] = wrapped
    return found
