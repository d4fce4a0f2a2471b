"""The baselines, random tokens and an even grid, where the decoder begins.

In ``patch_model`` they prune inside the decoder. Neither looks at attention, so they can choose
among projected features too, with the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from atp_patch.contract import Decision, DoorMethod, DoorView, LayerMethod, View
from atp_patch.methods import make_method

BASELINES = ("random", "uniform")


@dataclass(frozen=True)
class BaselineAtDoor(DoorMethod):
    """A layer method that reads no attention, as a method at the decoder's door.

    The choice depends on a picture's size alone, for ``random`` on the seed too: it knows nothing
    of the prompt.

    Attributes:
        baseline: the name of the layer method.
        settings: its options.
    """

    name: ClassVar[str] = "baseline-at-door"
    summary: ClassVar[str] = "random tokens or an even grid, before layer 0"

    baseline: str = "uniform"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method()  # wrong options are an error now

    def method(self) -> LayerMethod:
        """The layer method."""
        made = make_method(self.baseline, dict(self.settings))
        assert isinstance(made, LayerMethod)
        assert not made.attention_layers(1)
        return made

    def decide(self, view: DoorView) -> Decision:
        """Let the layer method decide as if layer 0 were about to run."""
        none = torch.zeros_like(view.token[:, :0])
        return self.method().decide(
            View(
                layout=view.layout,
                token=view.token,
                slot_valid=view.slot_valid,
                counts=view.counts,
                sample_key=torch.zeros_like(view.sample_key),
                min_tokens=view.min_tokens,
                min_tokens_per_image=view.min_tokens_per_image,
                layer=0,
                step=0,
                attention={},
                hidden=view.features,
                slot=view.token,
                text=none,
                text_valid=none.bool(),
                text_position=none,
                last=none.sum(1),
            ),
            None,
        )
