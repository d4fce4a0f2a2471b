"""Generated scenes: their objects and signs, and the questions about them.

Scenes are made by `make_scene(split, index)`. The same arguments give the same scene on every
machine, because all random numbers come from a generator that is seeded with the split's number and
the index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from atp_patch.builtin.glyphs import CELL_HEIGHT_PX, CELL_WIDTH_PX
from atp_patch.builtin.vocabulary import (
    BACKGROUND_COLOURS,
    CHARACTERS,
    MAX_OBJECTS,
    MAX_SIGN,
    OBJECT_COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
)

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PX = 192
PATCH_PX = 8
GRID = IMAGE_PX // PATCH_PX

SPLITS: dict[str, int] = {"train": 1, "development": 2, "test": 3}
"""The first word of each split's seeds, so that no two splits share a seed."""

RADIUS_PX: dict[str, tuple[int, int]] = {"small": (13, 15), "large": (22, 26)}
"""The smallest and largest half width of an object's bounding box."""


@dataclass(frozen=True)
class SceneConfig:
    """What scenes may contain. The defaults are those of the built-in model's training."""

    min_objects: int = 0
    max_objects: int = 8
    sign_share: float = 0.5
    plate_share: float = 0.4
    """The probability of a plate that looks like a sign but has no characters."""
    fonts: tuple[str, ...] = ("regular", "bold")
    sign_step_px: int = PATCH_PX
    """Positions of signs are multiples of this; 8 aligns them with the patches."""
    noise: float = 6.0
    """Standard deviation of the pixel noise, 0-255."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(
                f"need 0 <= min_objects <= max_objects <= {MAX_OBJECTS}, "
                f"got {self.min_objects} and {self.max_objects}"
            )
        for name in ("sign_share", "plate_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")


@dataclass(frozen=True)
class SceneObject:
    """One object with its attributes, centre and half width."""

    colour: str
    shape: str
    size: str
    x_px: int
    y_px: int
    radius_px: int


@dataclass(frozen=True)
class Sign:
    """A plate with 1-3 characters; (x_px, y_px) is its upper left corner."""

    text: str
    font: str
    x_px: int
    y_px: int

    @property
    def width_px(self) -> int:
        """Width of the plate."""
        return len(self.text) * CELL_WIDTH_PX + 2 * PATCH_PX

    @property
    def height_px(self) -> int:
        """Height of the plate."""
        return CELL_HEIGHT_PX + 2 * PATCH_PX


MARKS: tuple[str, ...] = ("nothing", "bars", "spots")
"""What can be drawn on a plate that is not a sign."""


@dataclass(frozen=True)
class Plate:
    """A plate like a sign's, as wide as `cells` characters, but without characters."""

    marks: str
    cells: int
    x_px: int
    y_px: int

    @property
    def width_px(self) -> int:
        """Width of the plate."""
        return self.cells * CELL_WIDTH_PX + 2 * PATCH_PX

    @property
    def height_px(self) -> int:
        """Height of the plate."""
        return CELL_HEIGHT_PX + 2 * PATCH_PX


@dataclass(frozen=True)
class Layout:
    """The contents of a scene that questions are about, and the plate that no question is about."""

    background: str
    texture: str
    objects: tuple[SceneObject, ...]
    sign: Sign | None
    plate: Plate | None = None

    @property
    def density(self) -> str:
        """How full the scene is: "sparse" up to 2 objects, "medium" up to 5, "dense" above."""
        number = len(self.objects)
        return "sparse" if number <= 2 else "medium" if number <= 5 else "dense"


@dataclass(frozen=True)
class Question:
    """A question and its only correct answer."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """An image, its contents, and questions about it."""

    split: str
    index: int
    image: Image
    layout: Layout
    questions: tuple[Question, ...]

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The objects of the layout."""
        return self.layout.objects


def scene_rng(split: str, index: int, stream: int = 0) -> np.random.Generator:
    """Make the random generator of a scene; layout, pixels and questions have different streams.

    Raises:
        ValueError: if the split is unknown or the index negative.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"a scene's index is 0 or more, got {index}")
    return np.random.Generator(np.random.PCG64([SPLITS[split], index, stream]))


def make_scene(
    split: str,
    index: int,
    config: SceneConfig | None = None,
    tasks: tuple[str, ...] | None = None,
) -> Scene:
    """Make the scene number `index` of a split, with its image (192 x 192 RGB) and questions.

    Args:
        split: "train", "development" or "test".
        index: 0 or more.
        config: what scenes may contain.
        tasks: the tasks of the questions; each entry gives one question if the scene allows it. A
            name may be repeated for several questions. By default each task is used once.
    """
    from atp_patch.builtin.questions import ask
    from atp_patch.builtin.render import draw

    config = config or SceneConfig()
    layout = sample_layout(scene_rng(split, index, 0), config)
    image = draw(layout, scene_rng(split, index, 1), config.noise)
    questions = ask(layout, scene_rng(split, index, 2), tasks)
    return Scene(split, index, image, layout, questions)


def sample_layout(rng: np.random.Generator, config: SceneConfig) -> Layout:
    """Draw a random layout, in which objects overlap neither each other nor the sign."""
    background = pick(rng, tuple(BACKGROUND_COLOURS))
    texture = pick(rng, TEXTURES)
    sign = _sample_sign(rng, config) if rng.random() < config.sign_share else None
    plate = None
    if config.plate_share and rng.random() < config.plate_share:
        plate = _sample_plate(rng, config, sign)
    plates = [p for p in (sign, plate) if p is not None]
    # A scene has few colours and shapes, so that they repeat and counts are not only 0 or 1.
    colours = _subset(rng, tuple(OBJECT_COLOURS), 2, 4)
    shapes = _subset(rng, SHAPES, 2, 4)
    wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
    objects: list[SceneObject] = []
    for _ in range(wanted):
        size = pick(rng, SIZES)
        place = _free_place(rng, size, objects, plates)
        if place is None and size == "large":
            size = "small"
            place = _free_place(rng, size, objects, plates)
        if place is None:
            continue
        x, y, radius = place
        objects.append(SceneObject(pick(rng, colours), pick(rng, shapes), size, x, y, radius))
    return Layout(background, texture, tuple(objects), sign, plate)


def pick(rng: np.random.Generator, items: tuple[str, ...] | list[str]) -> str:
    """Return one of the words, each as likely as the others."""
    return items[int(rng.integers(len(items)))]


def _subset(
    rng: np.random.Generator, items: tuple[str, ...], minimum: int, maximum: int
) -> tuple[str, ...]:
    chosen = rng.permutation(len(items))[: int(rng.integers(minimum, maximum + 1))]
    return tuple(items[int(i)] for i in chosen)


def _sample_sign(rng: np.random.Generator, config: SceneConfig) -> Sign:
    length = int(rng.integers(1, MAX_SIGN + 1))
    text = "".join(pick(rng, CHARACTERS) for _ in range(length))
    sign = Sign(text, pick(rng, config.fonts), 0, 0)
    step = config.sign_step_px
    x = int(rng.integers((IMAGE_PX - sign.width_px) // step + 1)) * step
    y = int(rng.integers((IMAGE_PX - sign.height_px) // step + 1)) * step
    return Sign(text, sign.font, x, y)


def _sample_plate(rng: np.random.Generator, config: SceneConfig, sign: Sign | None) -> Plate | None:
    """Draw a plate that does not touch the sign, or return None after 10 tries."""
    marks, cells = pick(rng, MARKS), int(rng.integers(1, MAX_SIGN + 1))
    step = config.sign_step_px
    for _ in range(10):
        plate = Plate(marks, cells, 0, 0)
        x = int(rng.integers((IMAGE_PX - plate.width_px) // step + 1)) * step
        y = int(rng.integers((IMAGE_PX - plate.height_px) // step + 1)) * step
        plate = Plate(marks, cells, x, y)
        if sign is None or _gap(plate, sign) > 0:
            return plate
    return None


def _gap(one: Plate, other: Sign) -> int:
    """Return the distance between two plates in pixels, 0 if they touch or overlap."""
    dx = max(one.x_px - other.x_px - other.width_px, other.x_px - one.x_px - one.width_px)
    dy = max(one.y_px - other.y_px - other.height_px, other.y_px - one.y_px - one.height_px)
    return max(dx, dy, 0)


def _free_place(
    rng: np.random.Generator,
    size: str,
    objects: list[SceneObject],
    plates: list[Sign | Plate],
) -> tuple[int, int, int] | None:
    """Draw a centre and half width that overlap nothing else, or return None after 40 tries."""
    minimum, maximum = RADIUS_PX[size]
    gap = 3
    for _ in range(40):
        radius = int(rng.integers(minimum, maximum + 1))
        x, y = (int(v) for v in rng.integers(radius + 1, IMAGE_PX - radius, size=2))
        if any(max(abs(x - o.x_px), abs(y - o.y_px)) < radius + o.radius_px + gap for o in objects):
            continue
        beside = (
            max(p.x_px - x, x - p.x_px - p.width_px, p.y_px - y, y - p.y_px - p.height_px)
            for p in plates
        )
        if all(distance >= radius + gap for distance in beside):
            return x, y, radius
    return None
