"""The stages of the second model's training."""

from __future__ import annotations

from atp_patch.builtin.scenes import IMAGE_PX, SceneConfig
from atp_patch.builtin.vocabulary import TASKS
from workshop.dynamic.batches import SizedSpec
from workshop.first_stages import SLOW_TASKS
from workshop.stage import Stage

_WEIGHT = {"count": 1.5, "relation": 1.2, "common": 1.5}


def _questions(offset: int, more: tuple[str, ...] = ()) -> SizedSpec:
    """Many questions about each image; a third of them follow another one."""
    return SizedSpec(
        images=6,
        questions=18,
        tasks=(*TASKS, *SLOW_TASKS, *SLOW_TASKS, *more),
        offset=offset,
        with_owners=True,
        pair_share=0.34,
    )


STAGES: tuple[Stage, ...] = (
    Stage(
        name="distil",
        kind="distil",
        steps=80,
        batch=SizedSpec(
            images=8,
            questions=1,
            offset=5_000_000,
            with_owners=True,
            scenes=SceneConfig(min_objects=2, sign_share=0.8),
            sides_px=(IMAGE_PX,),
        ),
        muon_rate=0.005,
        adam_rate=0.001,
        tower_rate=1.0,
        warm_up=10,
        decay=1,
    ),
    Stage(
        name="teach",
        kind="shallow",
        steps=200,
        batch=_questions(5_200_000, ("ocr", "ocr")),
        muon_rate=0.006,
        adam_rate=0.001,
        tower_rate=0.5,
        warm_up=20,
        decay=1,
        noun_weight=0.3,
        gaze_weight=0.1,
        side_weight=0.2,
        tally_weight=0.5,
        smooth_tally=True,
        task_weight=_WEIGHT,
    ),
    # Nothing but answers.
    Stage(
        name="joint",
        kind="shallow",
        steps=202,
        batch=_questions(5_300_000, ("count", "count", "common", "ocr")),
        muon_rate=0.004,
        adam_rate=0.0008,
        tower_rate=0.4,
        warm_up=10,
        decay=192,
        task_weight=_WEIGHT,
    ),
)
