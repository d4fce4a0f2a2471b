"""The threshold heads of ATP-LLaVA (eq. 6-8), one set for each pruning layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from atp_patch.maths import to_reference_grid
from atp_patch.methods.base import ModuleSpec
from atp_patch.types import Layout, View


class ThresholdHeads(nn.Module):
    """``z = Linear(cat(S_self, S_cross))``, ``theta = sigmoid(Linear(z))`` for both thresholds.

    The scores are brought to one ``grid`` x ``grid`` map, so that any resolution, tile and frame
    count has the same input size. Untrained heads start close to a budget: their output weights are
    small and their biases are the thresholds that keep ``spec.target_share`` on average.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        *,
        hidden_size: int,
        grid: int,
        spatial_share: float,
        lambda_sample: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        inputs = 2 * grid * grid
        self.z = nn.ModuleDict({str(i): nn.Linear(inputs, hidden_size) for i in spec.layers})
        self.theta_redundant = nn.ModuleDict(
            {str(i): nn.Linear(hidden_size, 1) for i in spec.layers}
        )
        self.theta_spatial = nn.ModuleDict({str(i): nn.Linear(hidden_size, 1) for i in spec.layers})
        # Of equal shares s at every pruning layer: first + (1 - first) * s = target on average.
        before = spec.layers[0] / spec.num_layers
        share = min(max((spec.target_share - before) / (1 - before), 0.02), 0.98)
        spatial = 1 - lambda_sample * spatial_share * share
        for layer in map(str, spec.layers):
            self._start(self.theta_redundant[layer], 1 - (1 - spatial_share) * share)
            self._start(self.theta_spatial[layer], spatial)

    @staticmethod
    def _start(head: nn.Module, theta: float) -> None:
        assert isinstance(head, nn.Linear)
        theta = min(max(theta, 0.02), 0.98)
        with torch.no_grad():
            head.weight.mul_(0.1)
            head.bias.fill_(math.log(theta / (1 - theta)))

    def forward(self, view: View, s_self: Tensor, s_cross: Tensor) -> tuple[Tensor, Tensor]:
        """Thresholds (theta_redundant, theta_spatial), each (B,) float32 in (0, 1).

        Args:
            s_self, s_cross: (B, V) float32 over the view's surviving visual tokens.
        """
        layer = str(view.layer)
        plane, heights, widths = planes(view.layout)
        maps = [
            to_reference_grid(
                scores,
                view.of_token(plane),
                view.of_token(view.layout.row),
                view.of_token(view.layout.column),
                view.slot_valid,
                heights,
                widths,
                self.grid,
            ).flatten(1)
            for scores in (s_self, s_cross)
        ]
        into_z = self.z[layer]
        assert isinstance(into_z, nn.Linear)
        weight = into_z.weight
        # Weights that accelerate has offloaded are on "meta" until their module is called.
        device = s_self.device if weight.is_meta else weight.device
        z = into_z(torch.cat(maps, dim=1).to(device, weight.dtype))
        thetas = (self.theta_redundant[layer](z), self.theta_spatial[layer](z))
        redundant, spatial = (torch.sigmoid(t.float())[:, 0].to(s_self.device) for t in thetas)
        return redundant, spatial


def planes(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Number the single frames of each sample: (B, V0) frame number, (B, G) heights and widths."""
    sizes = [
        [(g.height, g.width) for g in grids for _ in range(g.frames)] for grids in layout.grids
    ]
    table = torch.zeros(2, len(sizes), max(map(len, sizes)), dtype=torch.long)
    first = torch.zeros(len(sizes), max(map(len, layout.grids)), dtype=torch.long)
    for b, (grids, sample) in enumerate(zip(layout.grids, sizes, strict=True)):
        if sample:
            table[:, b, : len(sample)] = torch.tensor(sample).T
        frames = torch.tensor([0, *(g.frames for g in grids[:-1])])[: len(grids)]
        first[b, : len(grids)] = frames.cumsum(0)
    device = layout.image.device
    number = first.to(device).gather(1, layout.image) + layout.frame
    heights, widths = table.to(device).unbind()
    return number, heights, widths
