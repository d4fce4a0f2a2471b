"""The tasks about built-in scenes: scenes held out from training, and sets that differ from those
of training in one respect.

The sets that differ are for measuring; nothing may be chosen by what they show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial

from PIL import Image

from atp_patch.builtin import (
    LLAVA,
    SPLITS,
    TASKS,
    Question,
    Scene,
    SceneConfig,
    as_shown,
    make_scene,
)
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation.shades import repaint
from atp_patch.evaluation.tasks import Example, Task, register_task

BUILTIN = "builtin"
_SCENES_TO_TRY = 60  # scenes that are looked at for each question that is wanted


@dataclass(frozen=True)
class SceneSet:
    """Scenes of one kind and what is asked about them.

    Attributes:
        name: the name of the group of tasks.
        summary: what tables say is special about it.
        config: the config of the generator.
        tasks: the generator's tasks that are asked. Those of the set "builtin" keep their names;
            those of another set are called ``name/task``.
        change: makes the picture of a scene; None: it is the generator's.
    """

    name: str
    summary: str
    config: SceneConfig = field(default_factory=SceneConfig)
    tasks: tuple[str, ...] = TASKS
    change: Callable[[Scene], Image.Image] | None = None

    def task_name(self, task: str) -> str:
        """Return the name under which a task of this set is registered."""
        return task if self.name == BUILTIN else f"{self.name}/{task}"


_ABOUT_OBJECTS = tuple(task for task in TASKS if task not in ("ocr", "background", "texture"))
SETS: dict[str, SceneSet] = {
    kind.name: kind
    for kind in (
        SceneSet(BUILTIN, "scenes as in training, of a split that training never saw"),
        SceneSet(
            "dense", "9 objects, where they fit, one more than in training", SceneConfig(9, 9)
        ),
        SceneSet(
            "slanted",
            "signs in a font that training never showed",
            SceneConfig(sign_share=1.0, fonts=("slanted",)),
            ("ocr",),
        ),
        SceneSet(
            "offgrid",
            "signs at any pixel, not on multiples of the patch size",
            SceneConfig(sign_share=1.0, sign_step_px=1),
            ("ocr",),
        ),
        SceneSet(
            "shades",
            "objects in shades of their colours that training never showed",
            tasks=_ABOUT_OBJECTS,
            change=repaint,
        ),
    )
}


@lru_cache(maxsize=64)
def _scene(kind: str, split: str, number: int) -> Scene:
    return make_scene(split, number, SETS[kind].config)


@cache
def _questions(kind: str, split: str, number: int) -> tuple[Question, ...]:
    return _scene(kind, split, number).questions


def scene_image(kind: str, split: str, number: int, model: str = LLAVA) -> Image.Image:
    """Return the picture of a scene of a set, at the size at which a built-in model is shown it."""
    scene = as_shown(_scene(kind, split, number), model, SETS[kind].config)
    change = SETS[kind].change
    return scene.image if change is None else change(scene)


def scene_objects(kind: str, split: str, number: int) -> int:
    """Return the number of objects in a scene of a set."""
    return len(_scene(kind, split, number).objects)


def scene_examples(kind: str, task: str, split: str, count: int) -> list[Example]:
    """Return the first ``count`` questions of a task, in the order of their scenes, at most one for
    each scene.

    Raises:
        ConfigError: where too few scenes have such questions, or the split is unknown.
    """
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}; there are {', '.join(SPLITS)}.")
    name = SETS[kind].task_name(task)
    found: list[Example] = []
    for number in range(_SCENES_TO_TRY * count):
        if len(found) == count:
            break
        asked = [q for q in _questions(kind, split, number) if q.task == task][:1]
        found += [Example(name, number, q.text, q.answer) for q in asked]
    if len(found) < count:
        raise ConfigError(f"the generator asks too few questions of {name}: {len(found)}.")
    return found


for _set in SETS.values():
    for _task in _set.tasks:
        register_task(
            Task(
                name=_set.task_name(_task),
                group=_set.name,
                examples=partial(scene_examples, _set.name, _task),
                image=partial(scene_image, _set.name),
                stratum=partial(scene_objects, _set.name),
            )
        )
