"""What a layer method may learn: the module, its losses, and thresholds that can be calibrated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from atp_patch.contract.decision import Decision
from atp_patch.contract.view import View


@dataclass(frozen=True)
class ModuleSpec:
    """What a method's learned module is built for.

    Attributes:
        layers: the pruning layers.
        hidden_size: of the decoder.
        shares: of all visual tokens, what an untrained module is to leave after each pruning layer.
    """

    layers: tuple[int, ...]
    hidden_size: int
    shares: tuple[float, ...]


class LearnedThresholds(nn.Module, ABC):
    """Base class of modules whose thresholds :func:`atp_patch.calibrate` can set to a budget.

    A layer method with such a module returns, for each threshold, the scores under the same name
    (``Decision.scores`` and ``Decision.thresholds``), or has its own
    :meth:`~atp_patch.LayerMethod.margins`.

    Attributes:
        layers: the pruning layers that have thresholds.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers

    @abstractmethod
    def shift(self, layer: int, by: float) -> None:
        """Raise every threshold of a layer by a number, for every instance.

        Args:
            by: in the unit of the method's :meth:`~atp_patch.LayerMethod.margins`: a token whose
                margin is below it no longer stays. By default the unit is the logit of a threshold
                between 0 and 1.
        """


@dataclass(frozen=True)
class LearningStep:
    """What the losses of a method may see of one forward pass in training.

    ``S`` is the number of samples that have visual tokens; ``B``, of views and decisions, counts
    the others too.

    Attributes:
        counts: for each pruning layer, (S,) float32 with a gradient: tokens left after it.
        totals: (S,) float32, the tokens that entered the decoder.
        layers: the pruning layers.
        num_layers: the decoder's layers.
        target: visual tokens averaged over all decoder layers that are aimed at.
        samples: the rows of the batch that are counted, (S,) int64.
        views, decisions: pruning layer -> what the method saw there and what it decided.
        output: what the model returned: its loss, logits, and what else was asked of it.
    """

    counts: Sequence[Tensor]
    totals: Tensor
    layers: tuple[int, ...]
    num_layers: int
    target: float
    samples: Tensor
    views: Mapping[int, View]
    decisions: Mapping[int, Decision]
    output: Any
