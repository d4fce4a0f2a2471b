"""Thresholds that do not depend on the sample, as a control for adaptive ones."""

from __future__ import annotations

import torch
from torch import Tensor

from atp_patch.contract import View
from atp_patch.methods.atp_heads import Thresholds

_SIGNS = 16


class GivenThresholds(Thresholds):
    """Thresholds from a table with one row for all samples, or several rows that are shared out.

    The row of a sample depends only on its text and its image. It is the same at every pruning
    layer and in any batch.

    Args:
        logits: for each pruning layer, (M, 2) float32, logits of theta_redundant and theta_spatial.
    """

    def __init__(self, logits: dict[int, Tensor]) -> None:
        super().__init__(tuple(logits))
        for layer, table in logits.items():
            self.register_buffer(f"logits_{layer}", table.clone())

    def forward(
        self, view: View, s_self: Tensor, s_cross: Tensor, question: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the thresholds, as :meth:`Thresholds.forward` does."""
        table = self.get_buffer(f"logits_{view.layer}")
        thetas = torch.sigmoid(table)[_row(view, table.shape[0])].to(s_self.device)
        return thetas[:, 0], thetas[:, 1]

    def shift(self, layer: int, by: float) -> None:
        """Shift the thresholds of a layer, as :meth:`LearnedThresholds.shift` does."""
        self.get_buffer(f"logits_{layer}").add_(by)


def _row(view: View, rows: int) -> Tensor:
    """Return (B,) int64: a number below ``rows`` for each sample, from its words and image
    features.

    Only the signs of the features are used, because rounding does not change them.
    """
    key = view.sample_key.cpu()
    if view.embeds is not None:
        layout = view.layout.to(view.embeds.device)
        mean = (view.embeds.float() * layout.mask[..., None]).sum(1)[:, :_SIGNS].cpu()
        bits = (mean > 0).long() << torch.arange(mean.shape[1])
        key = key + 7919 * bits.sum(1)
    return key.abs() % rows
