"""The last stages of training, on all scenes and with second questions, and the whole recipe."""

from __future__ import annotations

from dataclasses import replace

from atp_patch.builtin.scenes import SceneConfig
from workshop.batches import BatchSpec
from workshop.first_stages import FIRST_STAGES, at_once
from workshop.stage import Stage


def _conversations(offset: int, more: tuple[str, ...] = ()) -> BatchSpec:
    """Questions like those of `at_once` about all scenes; a third of them follow another one."""
    return replace(at_once(offset, more), questions=16, pair_share=0.34, scenes=SceneConfig())


STAGES: tuple[Stage, ...] = (
    *FIRST_STAGES,
    # Scenes have up to 8 objects and plates without characters; some questions come second.
    Stage(
        name="wide",
        kind="shallow",
        steps=400,
        batch=_conversations(offset=2_000_000, more=("count", "count", "common")),
        muon_rate=0.005,
        adam_rate=0.001,
        tower_rate=0.3,
        warm_up=20,
        decay=1,
        noun_weight=0.5,
        gaze_weight=0.05,
        tally_weight=0.5,
        task_weight={"count": 2.0, "relation": 1.2, "common": 1.5},
    ),
    # From here on only answers are trained, so that the model itself decides at which depth.
    Stage(
        name="wide-free",
        kind="shallow",
        steps=500,
        batch=_conversations(offset=2_100_000, more=("count", "count", "common")),
        muon_rate=0.005,
        adam_rate=0.0008,
        tower_rate=0.2,
        warm_up=10,
        decay=400,
        task_weight={"count": 2.0, "relation": 1.2, "common": 1.5},
    ),
    # Counts above 2 are learned last, from more questions and with the tally loss again.
    Stage(
        name="wide-count",
        kind="shallow",
        steps=450,
        batch=replace(
            _conversations(offset=2_200_000, more=("count",) * 8 + ("common", "common")),
            scenes=SceneConfig(min_objects=3),
        ),
        muon_rate=0.006,
        adam_rate=0.001,
        warm_up=10,
        decay=200,
        noun_weight=0.3,
        tally_weight=1.0,
        task_weight={"count": 2.0, "common": 1.5},
    ),
    # The tally loss uses smooth middles.
    Stage(
        name="wide-tally",
        kind="shallow",
        steps=340,
        batch=replace(
            _conversations(offset=2_300_000, more=("count",) * 8 + ("common", "common")),
            scenes=SceneConfig(min_objects=2),
        ),
        muon_rate=0.006,
        adam_rate=0.001,
        tower_rate=0.3,
        warm_up=10,
        decay=180,
        noun_weight=0.3,
        tally_weight=1.0,
        smooth_tally=True,
        task_weight={"count": 2.0, "common": 1.5},
    ),
    Stage(
        name="wide-last",
        kind="shallow",
        steps=400,
        batch=_conversations(offset=2_400_000, more=("count",) * 4 + ("common",)),
        muon_rate=0.003,
        adam_rate=0.0006,
        tower_rate=0.2,
        warm_up=10,
        decay=380,
        task_weight={"count": 2.0, "relation": 1.2, "common": 1.5},
    ),
)
