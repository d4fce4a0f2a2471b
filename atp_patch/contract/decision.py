"""What a method decides: which visual tokens go on, and what the kept ones take in.

Shapes: ``B`` batch, ``L`` sequence, ``V`` visual tokens (packed, padded to the longest sample),
``T`` text rows, ``H`` heads, ``Hk`` key/value heads, ``K`` keys, ``d`` head size, ``D`` hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Recycled:
    """Kept tokens that take in others: what they carry on is a sum of hidden states.

    Attributes:
        column: (B, C) int64 over the view's visual tokens, kept ones; ``valid`` (B, C) bool.
        weight: (B, C, V) float32 of each visual token's hidden state.
    """

    column: Tensor
    valid: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Decision:
    """What a method decided before one layer.

    Attributes:
        keep: (B, V) bool over the view's surviving visual tokens.
        exact: True if ``keep`` keeps exactly the view's ``counts`` (saves a device
            synchronisation).
        scores: name -> (B, V) float32.
        thresholds: name -> (B,) float32.
        soft: (B, V) float32, where the view asks for learning: 1 kept, 0 not, with a gradient.
        counted: the same numbers, with the gradient that losses of their count take; None: that
            of ``soft``.
        recycled: which kept tokens take in others; None: none does.
    """

    keep: Tensor
    exact: bool = False
    scores: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    soft: Tensor | None = None
    counted: Tensor | None = None
    recycled: Recycled | None = None
