"""Pages of 5 to 80 words in lines, with or without a title."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atp_patch.builtin.documents.asked import DocumentQuestion, inks, pick_some
from atp_patch.builtin.documents.canvas import Box, Canvas
from atp_patch.builtin.documents.fonts import FONTS, SIZES_PX, font
from atp_patch.builtin.documents.words import ORDINALS, WORDS
from atp_patch.builtin.scenes import pick

TASKS: tuple[str, ...] = (
    "nth_word",
    "after",
    "on_page",
    "lines",
    "title",
    "read_line",
    "read_page",
)
MOST_WORDS, LEAST_WORDS = 80, 5
_MOST_READ = 50
"""Largest number of words of a page that is read as a whole."""
_MARGIN_PX = 8


@dataclass(frozen=True)
class Page:
    """The contents of a page.

    Attributes:
        lines: the words of each line.
        boxes: the box of each of these words.
        title: the words of the title.
        title_boxes: the box of each word of the title.
    """

    lines: list[list[str]]
    boxes: list[list[Box]]
    title: list[str]
    title_boxes: list[Box]


def draw(
    rng: np.random.Generator, width_px: int, height_px: int, fonts: tuple[str, ...] = FONTS
) -> tuple[Canvas, Page]:
    """Draw a page on which no word appears twice, title included."""
    paper, ink = inks(rng)
    canvas = Canvas(width_px, height_px, paper)
    name = pick(rng, fonts)
    # All sizes are equally likely, so that the number of words differs widely.
    size_px = SIZES_PX[int(rng.integers(len(SIZES_PX)))]
    written = font(name, size_px)
    step = written.height_px + int(rng.integers(1, max(size_px // 2, 3)))
    words = pick_some(rng, WORDS, MOST_WORDS)
    wanted = int(rng.integers(LEAST_WORDS, MOST_WORDS + 1))
    top, title, title_boxes = _MARGIN_PX, list[str](), list[Box]()
    if rng.random() < 0.5 and size_px < SIZES_PX[-1]:
        large = font(pick(rng, fonts), SIZES_PX[SIZES_PX.index(size_px) + 1])
        title = [words.pop().capitalize()]
        second = words[-1].capitalize()
        room = width_px - 2 * _MARGIN_PX
        if rng.random() < 0.6 and large.width_px(f"{title[0]} {second}") <= room:
            words.pop()
            title.append(second)
        if large.width_px(" ".join(title)) <= room:
            left = (width_px - large.width_px(" ".join(title))) // 2
            for word in title:
                title_boxes.append(canvas.text(large, word, left, top, ink))
                left = title_boxes[-1].right + large.width_px(" ")
            top += large.height_px + step // 2
        else:
            title = []
    wanted = min(wanted, len(words))  # the title has taken some
    lines: list[list[str]] = []
    boxes: list[list[Box]] = []
    while wanted > 0 and top + written.height_px <= height_px - _MARGIN_PX:
        left, line, row = _MARGIN_PX, list[str](), list[Box]()
        # A line ends at the margin or after a random number of words.
        most = int(rng.integers(2, 12))
        while wanted > 0 and len(line) < most:
            if left + written.width_px(words[-1]) > width_px - _MARGIN_PX:
                break
            row.append(canvas.text(written, words[-1], left, top, ink))
            line.append(words.pop())
            left = row[-1].right + written.width_px(" ")
            wanted -= 1
        if not line:
            break
        lines.append(line)
        boxes.append(row)
        top += step
    return canvas, Page(lines, boxes, title, title_boxes)


def ask(page: Page, rng: np.random.Generator, task: str) -> DocumentQuestion | None:
    """Make a question of a task, or return None if the page allows none."""
    first_of_lines = tuple(row[0] for row in page.boxes)
    every_word = tuple(box for row in page.boxes for box in row)
    line = int(rng.integers(len(page.lines)))
    words, row = page.lines[line], page.boxes[line]
    if task == "title":
        if not page.title:
            return None
        text = pick(rng, ("What is the title?", "Read the title.", "What is the page's title?"))
        return DocumentQuestion(task, text, " ".join(page.title), tuple(page.title_boxes))
    if task == "lines":
        text = pick(rng, ("How many lines of text are there?", "Count the lines below any title."))
        return DocumentQuestion(task, text, str(len(page.lines)), first_of_lines)
    if task == "on_page":
        everything = [word for one in page.lines for word in one]
        if rng.random() < 0.5:
            number = int(rng.integers(len(everything)))
            word, answer = everything[number], "yes"
            evidence: tuple[Box, ...] = (every_word[number],)
        else:
            known = set(everything) | {part.lower() for part in page.title}
            word = pick(rng, [word for word in WORDS if word not in known])
            answer, evidence = "no", (*every_word, *page.title_boxes)
        text = pick(rng, (f'Does "{word}" stand on the page?', f'Is the word "{word}" there?'))
        return DocumentQuestion(task, text, answer, evidence)
    if task == "read_page":
        everything = [*page.title, *(word for one in page.lines for word in one)]
        if len(everything) > _MOST_READ:
            return None
        text = pick(rng, ("Read the page.", "What is written on the page?"))
        return DocumentQuestion(task, text, " ".join(everything), (*page.title_boxes, *every_word))
    if line >= len(ORDINALS):
        return None
    if task == "read_line":
        text = f"Read the {ORDINALS[line]} line."
        return DocumentQuestion(task, text, " ".join(words), (*first_of_lines[:line], *row))
    if task == "nth_word":
        place = int(rng.integers(len(words)))
        text = f"What is the {ORDINALS[place]} word of the {ORDINALS[line]} line?"
        evidence = (*first_of_lines[:line], *row[: place + 1])
        return DocumentQuestion(task, text, words[place], evidence)
    if task == "after":
        if len(words) < 2:
            return None
        place = int(rng.integers(len(words) - 1))
        text = pick(
            rng,
            (
                f'Which word comes after "{words[place]}"?',
                f'What is the word behind "{words[place]}"?',
            ),
        )
        return DocumentQuestion(task, text, words[place + 1], tuple(row[place : place + 2]))
    raise ValueError(f"there is no task {task!r} about pages; there are {', '.join(TASKS)}.")
