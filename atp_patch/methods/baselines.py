"""Baselines to compare methods with at the same budget: random tokens and an even grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from atp_patch.contract import Decision, View
from atp_patch.maths import progressive_order
from atp_patch.methods.base import Ranking, grid_table

_MODULUS = 2**31 - 1


@dataclass(frozen=True)
class Random(Ranking):
    """Keep tokens drawn at random; they are the same for the same seed, question and layer.

    Attributes:
        seed: seed of the draw.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "seeded random tokens (baseline)"

    seed: int = 0

    def attention_layers(self, layer: int) -> tuple[int, ...]:
        """Return no layers, since no attention is read."""
        return ()

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Rank by a hash of (seed, layer, question, token), which does not depend on the batch."""
        start = (self.seed * 1_000_003 + view.layer * 7919) % _MODULUS
        scores = _mix(_mix(view.sample_key + start)[:, None] + view.token)
        keep = self.best(view, scores.float())
        return Decision(keep)


def _mix(value: Tensor) -> Tensor:
    """Scramble int64 numbers multiplicatively into [0, 2**31 - 1)."""
    for multiplier in (48271, 69621, 16807):
        value = (value % _MODULUS + 1) * multiplier % _MODULUS
        value = value ^ (value >> 15)
    return value % _MODULUS


@dataclass(frozen=True)
class Uniform(Ranking):
    """Keep an even grid of each image, tile or frame."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "an even grid over each image (baseline)"

    def attention_layers(self, layer: int) -> tuple[int, ...]:
        """Return no layers, since no attention is read."""
        return ()

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Rank by the place in an order of the grid that begins with the points farthest apart."""
        table = grid_table(view.layout, _evenness)
        keep = self.best(view, view.of_token(table))
        return Decision(keep)


def _evenness(height: int, width: int) -> Tensor:
    """Return (height * width,) float32 in (0, 1]: scores that fall in the order of the grid."""
    order = progressive_order(height, width)
    return 1.0 - order.to(torch.float32) / order.numel()
