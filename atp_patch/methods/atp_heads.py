"""The threshold heads of ATP-LLaVA (eq. 6-8), one set for each pruning layer."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from atp_patch.contract import Layout, LearnedThresholds, ModuleSpec, View
from atp_patch.maths import standardise_scores, to_reference_grid

# Renormalised probabilities are around 1 / V; this keeps the logarithm of much smaller ones finite.
_FLOOR = 1e-6


class Thresholds(LearnedThresholds):
    """Base class of modules that give every sample ATP's two thresholds at every pruning layer.

    Attributes:
        passes: () int64 buffer, the number of forward passes in training so far. It exists only if
            the slope is annealed, and it is saved with the weights.
    """

    passes: Tensor

    def __init__(self, layers: tuple[int, ...], *, anneals: bool = False) -> None:
        super().__init__(layers)
        if anneals:
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def forward(
        self, view: View, s_self: Tensor, s_cross: Tensor, question: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the thresholds theta_redundant and theta_spatial, each (B,) float32 in (0, 1).

        Args:
            view: what the method sees.
            s_self, s_cross: (B, V) float32, scores of the view's visual tokens.
            question: (B, D), hidden state of the last prompt token.
        """

    def through_biases(
        self, layer: int, redundant: Tensor, spatial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the same thresholds, (B,) each, with a gradient only to the biases behind them.

        Thresholds without biases are returned unchanged.

        Args:
            layer: the pruning layer.
            redundant, spatial: (B,) each, the thresholds that :meth:`forward` returned.
        """
        return redundant, spatial

    def annealed(self, view: View, first: float, last: float, over: int) -> Tensor:
        """Return the slope of this training pass, which changes from ``first`` to ``last``.

        It changes geometrically over ``over`` passes and is ``last`` afterwards. The passes are
        counted at the first pruning layer.
        """
        if view.step == 0:
            self.passes += 1
        done = ((self.passes - 1) / over).clamp(0.0, 1.0)
        return first * (last / first) ** done


class Affine(nn.Module):
    """A linear layer that is not an ``nn.Linear``, so that "all-linear" LoRA leaves it out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        made = nn.Linear(inputs, outputs)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return linear(x, self.weight, self.bias)


class ThresholdHeads(Thresholds):
    """``z = Linear(inputs)``, ``theta = sigmoid(Linear(z))`` for both thresholds.

    The inputs are both scores (eq. 6) and, if ``question`` is True, the hidden state of the last
    prompt token divided by its root mean square. The scores are resampled to one ``grid`` x
    ``grid`` map, so that the input size is the same for any resolution, number of tiles and number
    of frames. With ``standardise`` the inputs are S_self and log S_cross with mean 0 and variance 1
    over the sample's remaining tokens, instead of the scores themselves. (Constants measured on
    data would depend on the first batches of training and differ between processes.)

    Untrained heads start close to a budget: their output weights are small, and their biases give
    the thresholds ``start``.

    Args:
        spec: the pruning layers and sizes.
        start: for each pruning layer, its first theta_redundant and theta_spatial.
        hidden_size: the width of z.
        grid: the side of the grid to which scores are resampled.
        question: whether the hidden state of the last prompt token is an input.
        standardise: whether scores are standardised.
        anneals: whether the slope is annealed, so that passes must be counted.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        start: list[tuple[float, float]],
        *,
        hidden_size: int,
        grid: int,
        question: bool,
        standardise: bool,
        anneals: bool,
    ) -> None:
        super().__init__(spec.layers, anneals=anneals)
        self.grid, self.question, self.standardise = grid, question, standardise
        inputs = 2 * grid * grid + (spec.hidden_size if question else 0)
        names = [str(layer) for layer in spec.layers]
        self.z = nn.ModuleDict({name: Affine(inputs, hidden_size) for name in names})
        self.theta_redundant = nn.ModuleDict({name: Affine(hidden_size, 1) for name in names})
        self.theta_spatial = nn.ModuleDict({name: Affine(hidden_size, 1) for name in names})
        for name, (redundant, spatial) in zip(names, start, strict=True):
            self._start(self.theta_redundant[name], redundant)
            self._start(self.theta_spatial[name], spatial)

    @staticmethod
    def _start(head: nn.Module, theta: float) -> None:
        assert isinstance(head, Affine)
        with torch.no_grad():
            head.weight.mul_(0.1)
            head.bias.fill_(logit(theta))

    def forward(
        self, view: View, s_self: Tensor, s_cross: Tensor, question: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the thresholds, as :meth:`Thresholds.forward` does."""
        layer = str(view.layer)
        if self.standardise:
            s_self = standardise_scores(s_self, view.slot_valid)
            s_cross = standardise_scores((s_cross + _FLOOR).log(), view.slot_valid)
        plane, heights, widths = planes(view.layout)
        inputs = [
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
        if self.question:
            state = question.float().to(s_self.device)
            inputs.append(state * (state.square().mean(1, keepdim=True) + 1e-6).rsqrt())
        into_z = self.z[layer]
        assert isinstance(into_z, Affine)
        weight = into_z.weight
        # Weights that accelerate has offloaded are on "meta" until their module is called.
        device = s_self.device if weight.is_meta else weight.device
        z = into_z(torch.cat(inputs, dim=1).to(device, weight.dtype))
        thetas = (self.theta_redundant[layer](z), self.theta_spatial[layer](z))
        redundant, spatial = (torch.sigmoid(t.float())[:, 0].to(s_self.device) for t in thetas)
        return redundant, spatial

    def through_biases(
        self, layer: int, redundant: Tensor, spatial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the same thresholds, as :meth:`Thresholds.through_biases` does."""

        def moved(theta: Tensor, head: nn.Module) -> Tensor:
            assert isinstance(head, Affine)
            value, bias = theta.detach(), head.bias.to(theta)
            return value + value * (1 - value) * (bias - bias.detach())

        name = str(layer)
        return (
            moved(redundant, self.theta_redundant[name]),
            moved(spatial, self.theta_spatial[name]),
        )

    @torch.no_grad()
    def shift(self, layer: int, by: float) -> None:
        """Raise the biases of a layer's thresholds, as in :meth:`LearnedThresholds.shift`."""
        for heads in (self.theta_redundant, self.theta_spatial):
            head = heads[str(layer)]
            assert isinstance(head, Affine)
            head.bias.add_(by)


def logit(theta: float) -> float:
    """Return the number whose sigmoid is ``theta``, limited to where a sigmoid has a gradient."""
    theta = min(max(theta, 0.02), 0.98)
    return math.log(theta / (1 - theta))


def planes(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Number the frames of all images and videos of each sample.

    Returns:
        (B, V0) int64, the number of each token's frame; (B, G) int64 each, the heights and the
        widths of the frames.
    """
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
