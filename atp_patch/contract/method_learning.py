"""What a layer method may learn: the module, its losses, and thresholds that can be calibrated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from atp_patch.contract.decision import Decision
from atp_patch.contract.errors import ConfigError
from atp_patch.contract.view import View


@dataclass(frozen=True)
class ModuleSpec:
    """What a method needs to know to build its learned module.

    Attributes:
        layers: the pruning layers.
        hidden_size: hidden size of the decoder.
        shares: for each pruning layer, the share of all visual tokens that an untrained module
            should leave after it.
    """

    layers: tuple[int, ...]
    hidden_size: int
    shares: tuple[float, ...]


def check_module(built: Any, method: str) -> nn.Module | None:
    """Return what a method's ``build`` has made, which must be a module or None.

    Args:
        built: what it returned.
        method: the name of the method, for the message.

    Raises:
        ConfigError: if it is anything else.
    """
    if built is not None and not isinstance(built, nn.Module):
        raise ConfigError(
            f"{method}: build() returned {type(built).__name__}; return a torch.nn.Module, or None "
            "for a method that learns nothing."
        )
    return built


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
        """Raise every threshold of a layer by the same number, for every sample.

        Args:
            layer: the pruning layer.
            by: the number, in the unit of the method's :meth:`~atp_patch.LayerMethod.margins`:
                tokens whose margin is below it are dropped from then on. By default the unit is the
                logit of a threshold between 0 and 1.
        """


@dataclass(frozen=True)
class LearningStep:
    """What the losses of a method may use of one forward pass in training.

    ``S`` is the number of samples with visual tokens. The views and decisions have all ``B``
    samples of the batch.

    Attributes:
        counts: for each pruning layer, (S,) float32 with a gradient, the tokens left after it.
        totals: (S,) float32, the visual tokens that entered the decoder.
        layers: the pruning layers.
        num_layers: the number of decoder layers.
        target: the number of visual tokens, averaged over all decoder layers, to aim at.
        samples: (S,) int64, the rows of the batch that have visual tokens.
        views: for each pruning layer, what the method saw there.
        decisions: for each pruning layer, what the method decided there.
        output: the model's output, with its loss and logits.
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
