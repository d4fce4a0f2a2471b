"""The last stages: all scenes, more ways to ask, second questions; and the recipe as a whole."""

from __future__ import annotations

from dataclasses import replace

from atp_patch.builtin.scenes import SceneConfig
from workshop.batches import BatchSpec
from workshop.first_stages import FIRST_STAGES, at_once
from workshop.stage import Stage


def _conversations(offset: int, more: tuple[str, ...] = ()) -> BatchSpec:
    """The same of all scenes; a third of the questions follow another one."""
    return replace(at_once(offset, more), questions=16, pair_share=0.34, scenes=SceneConfig())


STAGES: tuple[Stage, ...] = (
    *FIRST_STAGES,
    # Up to 8 objects, plates that say nothing, more ways to ask, second questions.
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
    # Nothing but answers: at which depth they are found is the model's own from here on.
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
    # Counts above 2 are learned last: more of them, with attention that counts taught again.
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
    # The same with smooth middles.
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
