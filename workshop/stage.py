"""What one stage of training is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from workshop.batches import BatchSpec


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    name: str
    kind: Literal["tower", "shallow", "distil"]
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
    place_weight: float = 0.0
    """Weight of a patch's own row and column among the tower's labels."""
    windowed_steps: int = 0
    """First steps in which the tower sees windows of 12 x 12 patches only."""
    visual_tokens: int = 576
    """Patches that the decoder is shown. If not all, they come from a strided subset of the grid
    at a random phase, those that show something first."""
    stride: int = 2
    """Of the subset that fewer patches than all come from; 1 is the whole grid. A count is read off
    the share of attention that falls on objects, so that it depends on how many of their patches
    are shown: with a stride of 1 it is nearly what all of them give."""
    patch_weight: float = 0.0
    """Weight of the tower's own labels while the decoder is trained."""
    recentre: bool = False
    """Whether to standardise what the projector gives before the stage begins."""
    noun_weight: float = 0.0
    """Weight of the auxiliary loss at mid-depth: what nouns refer to."""
    gaze_weight: float = 0.0
    """Weight of the auxiliary loss on attention: where nouns refer to."""
    side_weight: float = 0.0
    """Weight of the auxiliary losses on where a question's second object lies from its first."""
    tally_weight: float = 0.0
    """Weight of the auxiliary loss on attention that counts what nouns refer to."""
    smooth_tally: bool = False
    """Whether the tally is of `patch_middles`, else of `patch_cores`."""
    task_weight: Mapping[str, float] = field(default_factory=dict)
