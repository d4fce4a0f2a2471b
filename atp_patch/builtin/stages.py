"""The recipe: stages in their order, with sizes, rates and weights."""

from __future__ import annotations

from dataclasses import replace

from atp_patch.builtin.batches import BatchSpec
from atp_patch.builtin.scenes import SceneConfig
from atp_patch.builtin.stage import Stage
from atp_patch.builtin.vocabulary import TASKS

# At first fewer objects and no plates that only look like signs.
_PLAIN = SceneConfig(max_objects=6, plate_share=0.0)
# Denser than what the model is asked about: more to learn from a picture.
_DENSE = SceneConfig(min_objects=3, max_objects=8, sign_share=0.9, plate_share=0.0)

_SLOW = ("count", "relation", "common", "shape", "colour")
"""Tasks that are learned last."""

_LATE_WEIGHT = {"count": 1.5, "relation": 1.5, "common": 1.5}


def _at_once(offset: int, more: tuple[str, ...] = ()) -> BatchSpec:
    """Many questions of one image, so that what it costs to see it is shared."""
    return BatchSpec(
        images=8,
        questions=18,
        tasks=(*TASKS, *_SLOW, *_SLOW, *more),
        offset=offset,
        with_owners=True,
        scenes=_PLAIN,
    )


def _conversations(offset: int, more: tuple[str, ...] = ()) -> BatchSpec:
    """The same of all scenes; a third of the questions follow another one."""
    return replace(_at_once(offset, more), questions=16, pair_share=0.34, scenes=SceneConfig())


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
        steps=300,
        batch=BatchSpec(images=4, views=2, offset=1_000_000, with_owners=True, scenes=_PLAIN),
        muon_rate=0.02,
        adam_rate=0.002,
        warm_up=30,
        decay=1,
        visual_tokens=144,
        noun_weight=1.0,
        task_weight={"count": 1.5, "relation": 1.5},
    ),
    Stage(
        name="strided-slow",
        kind="shallow",
        steps=101,
        batch=BatchSpec(images=4, views=2, offset=1_100_000, with_owners=True, scenes=_PLAIN),
        muon_rate=0.01,
        adam_rate=0.002,
        warm_up=10,
        decay=1,
        visual_tokens=144,
        noun_weight=1.0,
        task_weight={"count": 1.5, "relation": 1.5},
    ),
    Stage(
        name="gaze",
        kind="shallow",
        steps=282,
        batch=BatchSpec(images=4, views=2, offset=1_200_000, with_owners=True, scenes=_PLAIN),
        muon_rate=0.012,
        adam_rate=0.002,
        warm_up=10,
        decay=1,
        visual_tokens=64,
        noun_weight=1.0,
        gaze_weight=0.3,
        task_weight={"count": 1.5, "relation": 1.5},
    ),
    Stage(
        name="tower-place",
        kind="tower",
        steps=130,
        batch=BatchSpec(
            images=16, with_patch_labels=True, questions=1, scenes=_DENSE, offset=200_000
        ),
        muon_rate=0.006,
        adam_rate=0.0015,
        tower_rate=1.0,
        warm_up=10,
        decay=80,
        place_weight=2.0,
        windowed_steps=110,
    ),
    Stage(
        name="gaze-place",
        kind="shallow",
        steps=198,
        batch=BatchSpec(images=4, views=2, offset=1_300_000, with_owners=True, scenes=_PLAIN),
        muon_rate=0.012,
        adam_rate=0.002,
        warm_up=20,
        decay=1,
        visual_tokens=64,
        recentre=True,
        noun_weight=1.0,
        gaze_weight=0.3,
        task_weight={"count": 1.5, "relation": 1.5},
    ),
    Stage(
        name="gaze-slow",
        kind="shallow",
        steps=352,
        batch=BatchSpec(images=8, views=2, offset=1_400_000, with_owners=True, scenes=_PLAIN),
        muon_rate=0.005,
        adam_rate=0.001,
        warm_up=5,
        decay=1,
        visual_tokens=64,
        noun_weight=1.0,
        gaze_weight=0.2,
        task_weight={"count": 1.5, "relation": 1.5, "position": 1.5},
    ),
    Stage(
        name="joint",
        kind="shallow",
        steps=420,
        batch=BatchSpec(
            images=8,
            views=2,
            offset=1_500_000,
            with_owners=True,
            with_patch_labels=True,
            scenes=_PLAIN,
        ),
        muon_rate=0.005,
        adam_rate=0.001,
        tower_rate=0.8,
        warm_up=5,
        decay=320,
        visual_tokens=64,
        patch_weight=0.5,
        noun_weight=1.5,
        gaze_weight=0.2,
        task_weight={"count": 1.5, "relation": 2.0, "position": 2.0},
    ),
    Stage(
        name="words",
        kind="shallow",
        steps=466,
        batch=BatchSpec(images=8, views=2, offset=1_600_000, with_owners=True, scenes=_PLAIN),
        muon_rate=0.006,
        adam_rate=0.001,
        warm_up=10,
        decay=1,
        visual_tokens=64,
        noun_weight=1.5,
        gaze_weight=0.1,
        task_weight={"count": 1.5, "relation": 2.0, "position": 1.5, "shape": 1.5},
    ),
    Stage(
        name="relate",
        kind="shallow",
        steps=700,
        batch=BatchSpec(images=8, views=2, offset=1_800_000, with_owners=True, scenes=_PLAIN),
        muon_rate=0.006,
        adam_rate=0.001,
        warm_up=10,
        decay=500,
        visual_tokens=64,
        noun_weight=2.0,
        gaze_weight=0.1,
        task_weight={"count": 1.5, "relation": 2.0, "position": 1.2, "shape": 1.2},
    ),
    Stage(
        name="sides",
        kind="shallow",
        steps=346,
        batch=_at_once(offset=1_700_000, more=("relation", "relation")),
        muon_rate=0.006,
        adam_rate=0.001,
        warm_up=10,
        decay=1,
        visual_tokens=192,
        stride=1,
        noun_weight=1.0,
        gaze_weight=0.1,
        side_weight=1.0,
        task_weight=_LATE_WEIGHT,
    ),
    Stage(
        name="counts",
        kind="shallow",
        steps=700,
        batch=_at_once(offset=1_720_000, more=("relation", "relation")),
        muon_rate=0.006,
        adam_rate=0.001,
        warm_up=10,
        decay=350,
        visual_tokens=192,
        stride=1,
        noun_weight=1.0,
        gaze_weight=0.1,
        side_weight=0.7,
        tally_weight=1.0,
        task_weight=_LATE_WEIGHT,
    ),
    Stage(
        name="full",
        kind="shallow",
        steps=240,
        batch=_at_once(offset=1_900_000),
        muon_rate=0.003,
        adam_rate=0.0005,
        warm_up=10,
        decay=200,
        noun_weight=1.0,
        gaze_weight=0.1,
        side_weight=0.5,
        tally_weight=0.5,
        task_weight=_LATE_WEIGHT,
    ),
    Stage(
        name="free",
        kind="shallow",
        steps=500,
        batch=_at_once(offset=1_950_000, more=("count", "count", "common")),
        muon_rate=0.005,
        adam_rate=0.0008,
        warm_up=20,
        decay=400,
        task_weight={"count": 2.0, "relation": 1.2, "common": 1.5},
    ),
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
    Stage(
        name="wide-last",
        kind="shallow",
        steps=450,
        batch=_conversations(offset=2_300_000, more=("count",) * 4 + ("common",)),
        muon_rate=0.003,
        adam_rate=0.0006,
        tower_rate=0.2,
        warm_up=10,
        decay=430,
        task_weight={"count": 2.0, "relation": 1.2, "common": 1.5},
    ),
)
