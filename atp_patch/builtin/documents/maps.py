"""Maps: named places, and roads between some of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atp_patch.builtin.documents.asked import DocumentQuestion, inks, pick_some
from atp_patch.builtin.documents.canvas import Box, Canvas
from atp_patch.builtin.documents.fonts import FONTS, SIZES_PX, font
from atp_patch.builtin.documents.words import PLACES
from atp_patch.builtin.scenes import pick
from atp_patch.builtin.vocabulary import OBJECT_COLOURS

TASKS: tuple[str, ...] = ("connected", "neighbour", "roads", "places")
_CLEAR_PX = 5
"""Least distance of a road from places that are not its ends."""


@dataclass(frozen=True)
class Map:
    """The contents of a map.

    Attributes:
        places: name of each place.
        boxes: box of each place's dot and name.
        points: (x, y) of each place's dot in pixels.
        roads: pairs of places by their numbers, the smaller number first.
    """

    places: list[str]
    boxes: list[Box]
    points: list[tuple[int, int]]
    roads: list[tuple[int, int]]

    def of(self, place: int) -> list[int]:
        """Return the numbers of the places that are connected to a place by a road."""
        return [sum(road) - place for road in self.roads if place in road]

    def along(self, first: int, last: int) -> list[Box]:
        """Return small boxes along the straight line between two places."""
        (x, y), (u, v) = self.points[first], self.points[last]
        steps = max(abs(u - x), abs(v - y)) // 6 + 1
        middles = [
            (x + (u - x) * step // steps, y + (v - y) * step // steps) for step in range(steps + 1)
        ]
        return [Box(a - 1, b - 1, a + 2, b + 2) for a, b in middles]


def draw(
    rng: np.random.Generator, width_px: int, height_px: int, fonts: tuple[str, ...] = FONTS
) -> tuple[Canvas, Map]:
    """Draw 3 to 12 places with names below their dots, and roads that touch no third place."""
    paper, ink = inks(rng)
    canvas = Canvas(width_px, height_px, paper)
    written = font(pick(rng, fonts), SIZES_PX[int(rng.integers(3))])
    colour = OBJECT_COLOURS[pick(rng, tuple(OBJECT_COLOURS))]
    wanted, names = int(rng.integers(3, 13)), pick_some(rng, PLACES, 12)
    taken, points, places = list[Box](), list[tuple[int, int]](), list[str]()
    for name in names[:wanted]:
        half, below = max(written.width_px(name) // 2 + 1, 5), written.height_px + 6
        for _ in range(60):
            x = int(rng.integers(half + 2, width_px - half - 2))
            y = int(rng.integers(8, height_px - below - 2))
            box = Box(x - half, y - 5, x + half, y + below)
            if all(_apart(box, other) for other in taken):
                taken.append(box)
                points.append((x, y))
                places.append(name)
                break
    roads = list[tuple[int, int]]()
    drawn = Map(places, taken, points, roads)
    for _ in range(4 * len(places)):
        first, last = sorted(int(number) for number in rng.permutation(len(places))[:2])
        others = [box for number, box in enumerate(taken) if number not in (first, last)]
        way = drawn.along(first, last)
        clear = all(_apart(box, step) for box in others for step in way)
        if (first, last) not in roads and clear and len(roads) < 1.4 * len(places):
            roads.append((first, last))
    for first, last in roads:
        canvas.lines([points[first], points[last]], colour, 2)
    boxes = []
    for name, (x, y) in zip(places, points, strict=True):
        dot = canvas.dot(x, y, 4, ink)
        start = x - written.width_px(name) // 2
        under = Box(start, y + 5, start + written.width_px(name), y + 5 + written.height_px)
        text = canvas.text(written, name, under.left, canvas.fill(under, paper).top, ink)
        left, right = min(dot.left, text.left), max(dot.right, text.right)
        boxes.append(Box(left, dot.top, right, text.bottom))
    return canvas, Map(places, boxes, points, roads)


def ask(drawn: Map, rng: np.random.Generator, task: str) -> DocumentQuestion | None:
    """Make a question of a task, or return None if the map allows none."""
    number = len(drawn.places)
    if task == "places":
        text = pick(rng, ("How many places are on the map?", "Count the places on the map."))
        return DocumentQuestion(task, text, str(number), tuple(drawn.boxes))
    if number < 2:
        return None
    place = int(rng.integers(number))
    name, ends = drawn.places[place], drawn.of(place)
    about = [drawn.boxes[place], *(box for end in ends for box in drawn.along(place, end))]
    if task == "roads":
        text = pick(rng, (f"How many roads lead to {name}?", f"Count the roads to {name}."))
        return DocumentQuestion(task, text, str(len(ends)), tuple(about))
    if task == "neighbour":
        if len(ends) != 1:
            return None
        text = pick(rng, (f"What is connected to {name}?", f"Where does the road to {name} begin?"))
        return DocumentQuestion(task, text, drawn.places[ends[0]], (*about, drawn.boxes[ends[0]]))
    if task == "connected":
        others = [end for end in range(number) if end != place and end not in ends]
        joined = bool(ends) and (not others or rng.random() < 0.5)
        pool = ends if joined else others
        other = pool[int(rng.integers(len(pool)))]
        text = pick(
            rng,
            (
                f"Is there a road from {name} to {drawn.places[other]}?",
                f"Does a road connect {name} and {drawn.places[other]}?",
            ),
        )
        evidence = (drawn.boxes[place], drawn.boxes[other], *drawn.along(place, other))
        return DocumentQuestion(task, text, "yes" if joined else "no", evidence)
    raise ValueError(f"there is no task {task!r} about maps; there are {', '.join(TASKS)}.")


def _apart(box: Box, other: Box) -> bool:
    across = max(box.left - other.right, other.left - box.right)
    down = max(box.top - other.bottom, other.top - box.bottom)
    return max(across, down) >= _CLEAR_PX
