"""The words of all scenes, questions and answers."""

from __future__ import annotations

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 30, 35),
    "orange": (240, 130, 20),
    "yellow": (235, 220, 40),
    "green": (30, 150, 50),
    "cyan": (40, 205, 215),
    "blue": (35, 60, 205),
    "purple": (125, 40, 165),
    "pink": (245, 130, 190),
}
"""The mean RGB (0-255) of each colour of objects."""

BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (222, 222, 222),
    "grey": (135, 135, 135),
    "black": (48, 48, 48),
    "brown": (125, 88, 55),
}
"""The mean RGB (0-255) of each colour of backgrounds, none of which is a colour of objects."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "star")
PLURALS: dict[str, str] = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
SIZES: tuple[str, ...] = ("small", "large")
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checked")
CHARACTERS: tuple[str, ...] = tuple("CFHKLMPTVXYZ2457")
"""The characters of signs. Letters that are words of questions are left out."""

MAX_SIGN = 3
MAX_OBJECTS = 9

TASKS: tuple[str, ...] = (
    "exist",
    "colour",
    "shape",
    "count",
    "relation",
    "position",
    "size",
    "ocr",
    "common",
    "background",
    "texture",
)
"""The tasks, from questions about one object to questions about the whole scene."""

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

OPENERS: tuple[str, ...] = (
    *("How", "Is", "What", "Which", "Where", "Does", "Are", "Name", "Read"),
    *("Can", "Count", "In"),
)
"""Words that can begin a question; the tokenizer writes them in lower case."""

_FUNCTION_WORDS = (
    "? . , a an the is are there any of on in it many what which where how does do say colour "
    "shape shapes object objects one size sign background texture most common text written "
    "name read have left right above below top bottom or yes no"
)


def words() -> list[str]:
    """Return all words of questions and answers once, in the tokenizer's order."""
    digits = [str(n) for n in range(10)]
    everything = [
        *_FUNCTION_WORDS.split(),
        *SHAPES,
        *PLURALS.values(),
        *OBJECT_COLOURS,
        *BACKGROUND_COLOURS,
        *SIZES,
        *TEXTURES,
        *digits,
        *CHARACTERS,
        *["image", "part", "count", "lie", "can", "you", "see"],
    ]
    return list(dict.fromkeys(everything))
