"""The settings of one stage of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from workshop.batches import BatchSpec


@dataclass(frozen=True)
class Stage:
    """The settings of one stage of training."""

    name: str
    kind: Literal["tower", "shallow", "distil"]
    steps: int
    batch: BatchSpec
    muon_rate: float
    adam_rate: float
    warm_up: int
    """Number of first steps, in which the learning rate rises."""
    decay: int
    """Number of last steps, in which the learning rate falls."""
    tower_rate: float = 0.0
    """Factor of the tower's learning rates; 0 freezes the tower."""
    weight_decay: float = 0.0
    place_weight: float = 0.0
    """Weight of the row and column of a patch among the tower's labels."""
    windowed_steps: int = 0
    """Number of first steps in which the tower attends only within windows of 12 x 12 patches."""
    visual_tokens: int = 576
    """Number of patches that the decoder is shown. If not all are, they are chosen from a strided
    subset of the grid with a random offset, and those that show something are chosen first."""
    stride: int = 2
    """The stride of that subset; 1 is the whole grid. The model counts by the share of attention on
    objects, which depends on how many of their patches are shown. With a stride of 1 it is almost
    that of the whole grid."""
    patch_weight: float = 0.0
    """Weight of the tower's labels while the decoder is trained."""
    recentre: bool = False
    """Whether to standardise the projector's output before the stage begins."""
    noun_weight: float = 0.0
    """Weight of the auxiliary loss on what nouns refer to."""
    gaze_weight: float = 0.0
    """Weight of the auxiliary loss on attention to what nouns refer to."""
    side_weight: float = 0.0
    """Weight of the auxiliary losses on where the second object is relative to the first."""
    tally_weight: float = 0.0
    """Weight of the auxiliary loss on attention that counts what nouns refer to."""
    smooth_tally: bool = False
    """Whether the tally uses `patch_middles` instead of `patch_cores`."""
    task_weight: Mapping[str, float] = field(default_factory=dict)
