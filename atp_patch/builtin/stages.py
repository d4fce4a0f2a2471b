"""The recipe: stages in their order, with sizes, rates and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from atp_patch.builtin.batches import BatchSpec
from atp_patch.builtin.scenes import SceneConfig


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    name: str
    kind: Literal["tower", "shallow", "deep"]
    steps: int
    batch: BatchSpec
    muon_rate: float
    adam_rate: float
    warm_up: int
    """Steps of rising learning rate."""
    decay: int
    """Last steps, of falling learning rate."""
    tower_rate: float = 0.0
    """Learning rate of the tower as a share of the others'; 0 freezes it."""
    weight_decay: float = 0.0
    windowed_steps: int = 0
    """First steps in which the tower sees windows of 12 x 12 patches only."""
    strided: bool = False
    """Whether the decoder sees one patch of four, at a random phase."""
    noun_weight: float = 0.0
    """Weight of the auxiliary loss at mid-depth."""
    task_weight: Mapping[str, float] = field(default_factory=dict)


# Denser than what the model is asked about: more to learn from a picture.
_DENSE = SceneConfig(min_objects=3, max_objects=8, sign_share=0.9)

STAGES: tuple[Stage, ...] = (
    Stage(
        name="tower",
        kind="tower",
        steps=320,
        batch=BatchSpec(images=16, with_patch_labels=True, questions=1, scenes=_DENSE),
        muon_rate=0.02,
        adam_rate=0.003,
        tower_rate=1.0,
        warm_up=20,
        decay=1,
        windowed_steps=540,
    ),
    Stage(
        name="tower-slow",
        kind="tower",
        steps=330,
        batch=BatchSpec(
            images=16, with_patch_labels=True, questions=1, scenes=_DENSE, offset=100_000
        ),
        muon_rate=0.006,
        adam_rate=0.0015,
        tower_rate=1.0,
        warm_up=10,
        decay=180,
        windowed_steps=280,
    ),
    Stage(
        name="strided",
        kind="shallow",
        steps=1500,
        batch=BatchSpec(images=4, views=2, offset=1_000_000),
        muon_rate=0.02,
        adam_rate=0.002,
        warm_up=30,
        decay=700,
        strided=True,
        noun_weight=1.0,
        task_weight={"count": 1.5, "relation": 1.5},
    ),
)
