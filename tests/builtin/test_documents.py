"""Documents: the same everywhere, their answers read again from the pixels, and their evidence."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from numpy.typing import NDArray

from atp_patch.builtin import SPLITS
from atp_patch.builtin.documents import (
    KINDS,
    SIDES_PX,
    Box,
    Document,
    draw_document,
    make_document,
)
from atp_patch.builtin.documents.canvas import Canvas
from atp_patch.builtin.documents.fonts import FONTS, SIZES_PX, Font, font
from atp_patch.builtin.documents.icons import icons
from atp_patch.builtin.documents.pages import MOST_WORDS
from atp_patch.builtin.documents.words import COLUMNS, ICONS, NAMES, ORDINALS, PLACES, SERIES, WORDS


def clean(kind: str, index: int) -> Document:
    """A document without noise, so that glyphs can be found again."""
    return make_document(kind, "development", index, noise=0.0)


def ink_of(document: Document) -> NDArray[np.float32]:
    """(height, width) from 0 (paper) to 1 (ink) of a document in two colours."""
    grey = np.asarray(document.image).astype(np.float32).mean(-1)
    paper = grey[0, 0]
    far = grey.max() if abs(grey.max() - paper) > abs(grey.min() - paper) else grey.min()
    return (grey - paper) / (far - paper)


def written_in(ink: NDArray[np.float32], words: list[str]) -> Font:
    """The font in which all of these words stand in a picture."""
    for name in FONTS:
        for size in SIZES_PX:
            if all(_match(ink, _glyphs(font(name, size), word)) is not None for word in words):
                return font(name, size)
    raise AssertionError(f"{words} do not stand in the picture.")


def read(
    ink: NDArray[np.float32], words: tuple[str, ...], face: Font
) -> dict[str, tuple[int, int]]:
    """Word -> (top, left) of where it stands, found by sliding its glyphs over the picture.

    Nothing of the generator is used but the glyphs themselves.
    """
    places = {word: _match(ink, _glyphs(face, word)) for word in words}
    return {word: place for word, place in places.items() if place is not None}


def number_at(ink: NDArray[np.float32], top: int, left: int, face: Font) -> str:
    """The number of two digits that looks most like what stands at a place."""

    def miss(number: str) -> float:
        glyphs = _glyphs(face, number)
        here = ink[top : top + glyphs.shape[0], left : left + glyphs.shape[1]]
        return float(((here - glyphs) ** 2).sum())

    return min(map(str, range(10, 100)), key=miss)


def _glyphs(face: Font, text: str) -> NDArray[np.float32]:
    return face.ink(text).astype(np.float32) / 255


def _match(ink: NDArray[np.float32], glyphs: NDArray[np.float32]) -> tuple[int, int] | None:
    height, width = glyphs.shape
    if height > ink.shape[0] or width > ink.shape[1]:
        return None
    rows, columns = ink.shape[0] - height + 1, ink.shape[1] - width + 1
    # The correlation theorem: the sum of squared differences at every place at once.
    size = ink.shape
    spectrum = np.fft.rfft2(ink) * np.conj(np.fft.rfft2(glyphs, size))
    cross = np.fft.irfft2(spectrum, size)[:rows, :columns]
    square = np.pad(np.cumsum(np.cumsum(ink**2, 0), 1), ((1, 0), (1, 0)))
    energy = square[height:, width:] + square[:rows, :columns]
    energy = energy - square[:rows, width:] - square[height:, :columns]
    miss = energy - 2 * cross + (glyphs**2).sum()
    best = np.unravel_index(np.argmin(miss), miss.shape)
    if miss[best] > 0.02 * (glyphs**2).sum():
        return None
    return int(best[0]), int(best[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_document(kind: str) -> None:
    once, again = (make_document(kind, "train", 4) for _ in range(2))
    assert np.array_equal(np.asarray(once.image), np.asarray(again.image))
    assert once.questions == again.questions
    other = {make_document(kind, split, 4).image.tobytes() for split in SPLITS}
    assert len(other) == len(SPLITS)


def test_documents_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for kind in KINDS:
        document = make_document(kind, "test", 1)
        digest.update(document.image.tobytes())
        digest.update(repr([(q.text, q.answer) for q in document.questions]).encode())
    assert digest.hexdigest()[:16] == "5c15ea966c75c979"


def test_pages_say_what_their_questions_say() -> None:
    checked = 0
    for index in range(2):
        document = clean("page", index)
        ink = ink_of(document)
        (line,) = (q.answer.split() for q in document.questions if q.task == "read_line")
        places = read(ink, WORDS, written_in(ink, line))
        rows = sorted({top for top, _ in places.values()})
        lines = [
            sorted((word for word in places if places[word][0] == row), key=lambda w: places[w][1])
            for row in rows
        ]
        flat = [word for one in lines for word in one]
        for question in document.questions:
            quoted = re.findall(r'"(\w+)"', question.text)
            counted = [
                ORDINALS.index(w) for w in re.findall(r"\w+", question.text) if w in ORDINALS
            ]
            if question.task == "on_page":
                assert question.answer == ("yes" if quoted[0] in places else "no")
            elif question.task == "lines":
                assert question.answer == str(len(lines))
            elif question.task == "read_line":
                assert question.answer.split() == lines[counted[0]]
            elif question.task == "read_page":
                title = next((q.answer for q in document.questions if q.task == "title"), "")
                assert question.answer.split() == [*title.split(), *flat]
            elif question.task == "after":
                assert flat[flat.index(quoted[0]) + 1] == question.answer
            elif question.task == "nth_word":
                assert question.answer == lines[counted[1]][counted[0]]
            checked += 1
    assert checked >= 9


def test_the_fullest_page_uses_every_word_once() -> None:
    """A page of all words whose title takes the last of them."""
    canvas, page = draw_document("page", "development", 186)
    words = [word for line in page.lines for word in line]
    assert page.title
    assert len(page.title) + len(words) == MOST_WORDS
    assert len({word.lower() for word in (*page.title, *words)}) == MOST_WORDS
    assert len(canvas.writings) == MOST_WORDS


def test_tables_say_what_their_questions_say() -> None:
    for index in range(3):
        document = clean("table", index)
        ink = ink_of(document)
        asked = " ".join(question.text for question in document.questions)
        face = written_in(ink, [w for w in NAMES + COLUMNS if re.search(rf"\b{w}\b", asked)])
        names, columns = read(ink, NAMES, face), read(ink, COLUMNS, face)
        for question in document.questions:
            row = next((w for w in names if re.search(rf"\b{w}\b", question.text)), "")
            column = next((w for w in columns if re.search(rf"\b{w}\b", question.text)), "")
            if question.task == "rows":
                assert question.answer == str(len(names))
            elif question.task == "cell":
                left = columns[column][1]
                assert question.answer == number_at(ink, names[row][0], left, face)
            elif question.task == "read_row":
                lefts = sorted(left for _, left in columns.values())
                cells = [number_at(ink, names[row][0], left, face) for left in lefts]
                assert question.answer.split() == cells
            elif question.task == "read_table":
                lefts = sorted(left for _, left in columns.values())
                read_rows = [one.split() for one in question.answer.split(", ")]
                assert [one[0] for one in read_rows] == sorted(names, key=names.__getitem__)
                for name, *cells in read_rows:
                    top = names[name][0]
                    assert cells == [number_at(ink, top, left, face) for left in lefts]
            elif question.task == "largest":
                left = columns[column][1]
                column_of = {
                    n: int(number_at(ink, top, left, face)) for n, (top, _) in names.items()
                }
                assert question.answer == max(column_of, key=lambda name: column_of[name])


def test_charts_and_maps_show_the_names_they_speak_of() -> None:
    for kind, known in (("chart", SERIES), ("map", PLACES)):
        for index in range(3):
            document = clean(kind, index)
            for question in document.questions:
                spoken = [
                    w for w in known if re.search(rf"\b{w}\b", question.text + question.answer)
                ]
                for word in spoken:
                    boxes = [
                        np.asarray(document.image)[b.top : b.bottom, b.left : b.right]
                        for b in question.evidence
                    ]
                    assert any(_holds(box, word) for box in boxes), (kind, index, question)


def test_all_values_of_a_chart_agree_with_its_other_questions() -> None:
    checked = 0
    for index in range(8):
        answers = {q.task: q for q in make_document("chart", "development", index).questions}
        pairs = [one.split() for one in answers["all_values"].answer.split(", ")]
        values = {label: int(value) for label, value in pairs}
        assert str(len(values)) == answers["points"].answer
        named = re.findall(r"\b(" + "|".join(SERIES) + r")\b", answers["value"].text)
        assert values[named[0]] == int(answers["value"].answer)
        if "highest" in answers:
            assert max(values, key=values.__getitem__) == answers["highest"].answer
            checked += 1
    assert checked > 2


def test_sheets_show_the_icons_they_speak_of() -> None:
    for index in range(6):
        document = clean("icons", index)
        pixels = np.asarray(document.image)
        for question in document.questions:
            shown = [_icon_at(pixels, box) for box in question.evidence]
            named = [w for w in ICONS if re.search(rf"\b{w}\b", question.text)]
            if question.task == "count":
                assert shown == named * int(question.answer)
            elif question.task == "there":
                assert (named == shown) if question.answer == "yes" else (named[0] not in shown)
            elif question.task == "right_of":
                assert shown == [*named, question.answer]
                left, right = question.evidence
                assert left.right < right.left
            elif question.task == "name_all":
                assert shown == question.answer.replace(",", "").split()
            else:
                answer = question.answer.split()
                assert shown[-len(answer) :] == answer
                rank = ORDINALS.index(question.text.split()[-2])
                assert len(shown) == rank + len(answer)


def _icon_at(pixels: NDArray[np.uint8], box: Box) -> str:
    """The icon whose own colours are in the box, wherever it is opaque."""
    part = pixels[box.top : box.bottom, box.left : box.right].astype(int)
    fits = []
    for name, picture in icons(box.right - box.left).items():
        opaque = picture[..., 3] == 255
        if np.abs(part - picture[..., :3])[opaque].max() <= 1:
            fits.append(name)
    (name,) = fits
    return name


def _holds(part: NDArray[np.uint8], word: str) -> bool:
    """Whether a word stands in a part of a picture, on paper of the colour of its first pixel."""
    grey = part.astype(np.float32).mean(-1)
    paper = grey[-1, 0]
    spread = np.abs(grey - paper).max()
    if spread < 30:
        return False
    ink = np.abs(grey - paper) / spread
    for name in FONTS:
        for size in SIZES_PX:
            glyphs = font(name, size).ink(word).astype(np.float32) / 255
            height, width = glyphs.shape
            for top in range(grey.shape[0] - height + 1):
                for left in range(grey.shape[1] - width + 1):
                    here = ink[top : top + height, left : left + width]
                    if ((here - glyphs) ** 2).sum() < 0.05 * (glyphs**2).sum():
                        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_lies_in_the_picture_and_is_never_empty(kind: str) -> None:
    for index in range(20):
        document = make_document(kind, "train", index)
        width, height = document.image.size
        assert {width, height} <= set(SIDES_PX)
        for question in document.questions:
            tokens = question.evidence_tokens(width, height, 16)
            assert tokens
            assert all(0 <= r < height // 16 and 0 <= c < width // 16 for r, c in tokens)


def test_what_a_question_needs_ranges_over_a_factor_of_ten() -> None:
    shares = []
    for kind in KINDS:
        for index in range(25):
            document = make_document(kind, "development", index)
            width, height = document.image.size
            tokens = width // 16 * (height // 16)
            shares += [
                len(q.evidence_tokens(width, height, 16)) / tokens for q in document.questions
            ]
    least, most = np.percentile(shares, [5, 95])
    assert most > 10 * least


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no kind"):
        make_document("poem", "train", 0)
    with pytest.raises(ValueError, match="there is no font"):
        font("gothic", 11)
    with pytest.raises(ValueError, match="printable ASCII"):
        font("sans", 11).ink("né")


def test_a_canvas_knows_where_each_character_stands() -> None:
    face = font("serif", 18)
    canvas = Canvas(200, 60, (255, 255, 255))
    box = canvas.text(face, "two Words", 31, 20, (0, 0, 0))
    (writing,) = canvas.writings
    assert (writing.text, writing.top, writing.bottom) == ("two Words", box.top, box.bottom)
    assert (writing.edges[0], writing.edges[-1]) == (box.left, box.right)
    for place, character in enumerate(writing.text):
        left, right = writing.edges[place : place + 2]
        ink = 255 - canvas.pixels[writing.top : writing.bottom, left:right, 0]
        assert np.array_equal(ink, face.ink(character))
