"""Questions about a layout, each with one true answer by construction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from atp_patch.builtin.scenes import IMAGE_PX, Layout, Question, SceneObject, pick
from atp_patch.builtin.vocabulary import (
    OBJECT_COLOURS,
    PLURALS,
    RELATIONS,
    SHAPES,
    TASKS,
)

RELATION_MARGIN_PX = 20
"""The centres of two objects differ by at least this much along the axis of the question."""

POSITION_MARGIN_PX = 12
"""The centre of an object is at least this far from both middle lines of the image."""

Asked = tuple[str, str]
"""The text of a question and its answer."""


def ask(
    layout: Layout, rng: np.random.Generator, tasks: tuple[str, ...] | None = None
) -> tuple[Question, ...]:
    """Make one question for each entry of `tasks` that the layout allows, without repetitions.

    A task is left out if the layout allows no unambiguous question of it. For example, a scene
    without a sign has no ocr question.

    Raises:
        ValueError: if a task is unknown.
    """
    questions: dict[str, Question] = {}
    for task in tasks if tasks is not None else TASKS:
        if task not in _ASKERS:
            raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
        for _ in range(3):
            asked = _ASKERS[task](layout, rng)
            if asked is not None and asked[0] not in questions:
                questions[asked[0]] = Question(task, *asked)
                break
    return tuple(questions.values())


def _unique(layout: Layout) -> list[SceneObject]:
    """Return the objects that no other object shares both colour and shape with."""
    names = Counter((o.colour, o.shape) for o in layout.objects)
    return [o for o in layout.objects if names[o.colour, o.shape] == 1]


def _exist(layout: Layout, rng: np.random.Generator) -> Asked | None:
    pairs = {(o.colour, o.shape) for o in layout.objects}
    if layout.objects and rng.random() < 0.5:
        chosen = layout.objects[int(rng.integers(len(layout.objects)))]
        colour, shape = chosen.colour, chosen.shape
    else:
        # Most are near misses: the colour and the shape occur in the scene, but not in one object.
        near = [
            (c, s)
            for c in sorted({c for c, _ in pairs})
            for s in sorted({s for _, s in pairs})
            if (c, s) not in pairs
        ]
        if near and rng.random() < 0.6:
            colour, shape = near[int(rng.integers(len(near)))]
        else:
            colour, shape = pick(rng, tuple(OBJECT_COLOURS)), pick(rng, SHAPES)
    name = f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
    text = pick(rng, (f"Is there {name}?", f"Is {name} there?", f"Can you see {name}?"))
    return text, "yes" if (colour, shape) in pairs else "no"


def _colour(layout: Layout, rng: np.random.Generator) -> Asked | None:
    counts = Counter(o.shape for o in layout.objects)
    lone = [o for o in layout.objects if counts[o.shape] == 1]
    if not lone:
        return None
    chosen = lone[int(rng.integers(len(lone)))]
    forms = (
        f"What colour is the {chosen.shape}?",
        f"Which colour does the {chosen.shape} have?",
        f"Name the colour of the {chosen.shape}.",
    )
    return pick(rng, forms), chosen.colour


def _shape(layout: Layout, rng: np.random.Generator) -> Asked | None:
    counts = Counter(o.colour for o in layout.objects)
    lone = [o for o in layout.objects if counts[o.colour] == 1]
    if not lone:
        return None
    chosen = lone[int(rng.integers(len(lone)))]
    forms = (
        f"What shape is the {chosen.colour} object?",
        f"What is the {chosen.colour} object?",
        f"Name the shape of the {chosen.colour} object.",
    )
    return pick(rng, forms), chosen.shape


def _count(layout: Layout, rng: np.random.Generator) -> Asked | None:
    kind = rng.random()
    if kind < 0.5:
        counts = Counter(o.colour for o in layout.objects)
        word = _even_choice(rng, counts, tuple(OBJECT_COLOURS))
        noun = f"{word} shapes"
    elif kind < 0.85:
        counts = Counter(o.shape for o in layout.objects)
        word = _even_choice(rng, counts, SHAPES)
        noun = PLURALS[word]
    else:
        counts = Counter({"all": len(layout.objects)})
        word, noun = "all", "shapes"
    forms = (
        f"How many {noun} are there?",
        f"How many {noun} are in the image?",
        f"Count the {noun}.",
    )
    return pick(rng, forms), str(counts[word])


def _even_choice(rng: np.random.Generator, counts: Counter[str], words: tuple[str, ...]) -> str:
    """Choose a word so that all counts that occur, 0 included, are equally likely."""
    levels = sorted({counts[w] for w in words})
    level = levels[int(rng.integers(len(levels)))]
    return pick(rng, [w for w in words if counts[w] == level])


def _relation(layout: Layout, rng: np.random.Generator) -> Asked | None:
    objects = _unique(layout)
    if len(objects) < 2:
        return None
    for _ in range(8):
        i, j = (int(k) for k in rng.permutation(len(objects))[:2])
        first, second = objects[i], objects[j]
        relation = pick(rng, RELATIONS)
        if relation in ("left of", "right of"):
            gap = second.x_px - first.x_px
        else:
            gap = second.y_px - first.y_px
        if abs(gap) < RELATION_MARGIN_PX:
            continue
        holds = gap > 0 if relation in ("left of", "above") else gap < 0
        one, other = (f"{o.colour} {o.shape}" for o in (first, second))
        forms = (
            f"Is the {one} {relation} the {other}?",
            f"Does the {one} lie {relation} the {other}?",
        )
        return pick(rng, forms), "yes" if holds else "no"
    return None


def _position(layout: Layout, rng: np.random.Generator) -> Asked | None:
    middle = IMAGE_PX // 2
    objects = [
        o
        for o in _unique(layout)
        if min(abs(o.x_px - middle), abs(o.y_px - middle)) >= POSITION_MARGIN_PX
    ]
    if not objects:
        return None
    chosen = objects[int(rng.integers(len(objects)))]
    row = "top" if chosen.y_px < middle else "bottom"
    column = "left" if chosen.x_px < middle else "right"
    name = f"{chosen.colour} {chosen.shape}"
    forms = (f"Where is the {name}?", f"In which part of the image is the {name}?")
    return pick(rng, forms), f"{row} {column}"


def _size(layout: Layout, rng: np.random.Generator) -> Asked | None:
    objects = _unique(layout)
    if not objects:
        return None
    chosen = objects[int(rng.integers(len(objects)))]
    name = f"{chosen.colour} {chosen.shape}"
    forms = (
        f"Is the {name} small or large?",
        f"What size is the {name}?",
        f"How large is the {name}?",
    )
    return pick(rng, forms), chosen.size


def _ocr(layout: Layout, rng: np.random.Generator) -> Asked | None:
    if layout.sign is None:
        return None
    forms = ("What does the sign say?", "What is written on the sign?", "Read the sign.")
    return pick(rng, forms), " ".join(layout.sign.text)


def _common(layout: Layout, rng: np.random.Generator) -> Asked | None:
    ranked = Counter(o.colour for o in layout.objects).most_common(2)
    if not ranked or ranked[0][1] < 2 or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    forms = (
        "Which colour is most common?",
        "What is the most common colour?",
        "Name the most common colour.",
    )
    return pick(rng, forms), ranked[0][0]


def _background(layout: Layout, rng: np.random.Generator) -> Asked | None:
    forms = (
        "What colour is the background?",
        "Which colour does the background have?",
        "Name the colour of the background.",
    )
    return pick(rng, forms), layout.background


def _texture(layout: Layout, rng: np.random.Generator) -> Asked | None:
    forms = (
        "What texture does the background have?",
        "What is the texture of the background?",
        "Name the texture of the background.",
    )
    return pick(rng, forms), layout.texture


_ASKERS: dict[str, Callable[[Layout, np.random.Generator], Asked | None]] = {
    "exist": _exist,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "position": _position,
    "size": _size,
    "ocr": _ocr,
    "common": _common,
    "background": _background,
    "texture": _texture,
}
