"""The registry of tasks and the shifted sets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from atp_patch.builtin import TASKS, make_scene
from atp_patch.builtin.documents import KINDS, make_document
from atp_patch.builtin.render import outline
from atp_patch.builtin.vocabulary import OBJECT_COLOURS
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation.documents import OPEN, document_examples, document_image
from atp_patch.evaluation.scenes import SETS, scene_examples, scene_image
from atp_patch.evaluation.shades import LEAST_SHIFT, repaint, shade
from atp_patch.evaluation.tasks import (
    Task,
    available_tasks,
    choose_tasks,
    exact_match,
    loose_match,
    register_task,
    task_groups,
    words_match,
)


def test_names_groups_and_all() -> None:
    assert [t.name for t in choose_tasks(["builtin"])] == list(TASKS)
    assert [t.name for t in choose_tasks(["ocr", "exist", "ocr"])] == ["exist", "ocr"]
    assert [t.name for t in choose_tasks(["slanted"])] == ["slanted/ocr"]
    everything = choose_tasks(available_tasks())
    assert [t.name for t in everything] == available_tasks()
    assert choose_tasks(["all"]) == [t for t in everything if not t.reads]
    assert task_groups() == [*SETS, *KINDS]
    assert {t.group for t in everything if t.reads} == set(KINDS)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'taste'; groups are builtin, .*tasks are exist"):
        choose_tasks(["exist", "taste"])


@pytest.mark.parametrize("name", ["ocr", "dense", "all"])
def test_a_taken_name_is_refused(name: str) -> None:
    def none(*_: object) -> list[object]:
        return []

    with pytest.raises(ConfigError, match="already"):
        register_task(Task(name, "other", none, none))  # type: ignore[arg-type]


def test_words_match_in_their_order() -> None:
    assert words_match("Ada 45, Ben 12.", "Ada 45 Ben 12") == 1
    assert words_match("ada ben", "Ada Cora Ben Dan") == pytest.approx(2 * 2 / 6)
    assert words_match("Ben Ada", "Ada Ben") == pytest.approx(2 * 1 / 4)
    assert words_match("", "Ada") == 0


def test_open_tasks_are_scored_by_words_and_may_be_long() -> None:
    for task in choose_tasks(list(KINDS)):
        several = any(" " in e.answer for e in task.examples("development", 3))
        if task.name in OPEN:
            assert several or task.name == "table/read_row"
        assert (task.loose is words_match) == (task.name in OPEN) == (not task.exact)
        assert (task.new_tokens > 16) == (task.name in OPEN)


def test_matches() -> None:
    assert exact_match(" top left", "top left") == 1
    assert exact_match("Top left.", "top left") == 0
    assert loose_match("Top left.", "top left") == 1
    assert loose_match("top", "top left") == 0


@pytest.mark.parametrize("kind", list(SETS))
def test_questions_are_the_first_of_their_split_and_true(kind: str) -> None:
    task = SETS[kind].tasks[0]
    few = scene_examples(kind, task, "development", 3)
    more = scene_examples(kind, task, "development", 6)
    assert more[:3] == few
    assert len({e.number for e in more}) == 6
    for example in more:
        scene = make_scene("development", example.number, SETS[kind].config)
        assert (example.question, example.answer) in [
            (q.text, q.answer) for q in scene.questions if q.task == task
        ]
    assert few != scene_examples(kind, task, "test", 3)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="no split 'validation'"):
        scene_examples("builtin", "ocr", "validation", 1)


def test_shifted_sets_are_shifted() -> None:
    for number in range(12):
        dense = make_scene("development", number, SETS["dense"].config)
        assert len(dense.objects) >= 4
        slanted = make_scene("development", number, SETS["slanted"].config).layout.sign
        assert slanted is not None
        assert slanted.font == "slanted"
    signs = [make_scene("development", n, SETS["offgrid"].config).layout.sign for n in range(12)]
    assert any(s.x_px % 8 or s.y_px % 8 for s in signs if s is not None)


def test_objects_are_repainted_and_nothing_else_is() -> None:
    seen = 0
    for number in range(10):
        scene = make_scene("development", number)
        before = np.asarray(scene.image).astype(float)
        picture = repaint(scene)
        after = np.asarray(picture).astype(float)
        anything = np.zeros(before.shape[:2], dtype=bool)
        for item in scene.objects:
            inside = _inside(outline(item), scene.image.size)
            anything |= inside
            mean = np.array(OBJECT_COLOURS[item.colour])
            off = np.abs(after[inside].mean(0) - mean).max()
            assert off > LEAST_SHIFT - 6  # clipping of noise at 0 and 255 moves a mean a little
            seen += 1
        assert (before == after)[~anything].all()
        assert (np.asarray(repaint(scene)) == np.asarray(picture)).all()
    assert seen > 10


@pytest.mark.parametrize("colour", list(OBJECT_COLOURS))
def test_a_shade_is_new_and_nearest_to_its_own_colour(colour: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rgb = shade(colour, rng)
        mean = np.array(OBJECT_COLOURS[colour])
        assert np.abs(rgb - mean).max() >= LEAST_SHIFT > 12 + 1
        nearest = min(OBJECT_COLOURS, key=lambda c: np.linalg.norm(rgb - OBJECT_COLOURS[c]))
        assert nearest == colour


def test_the_picture_of_a_set() -> None:
    plain = scene_image("builtin", "development", 3)
    assert plain.tobytes() == make_scene("development", 3).image.tobytes()
    assert scene_image("shades", "development", 3).tobytes() != plain.tobytes()


def _inside(corners: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    from PIL import ImageDraw

    mask = Image.new("1", size)
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    return np.asarray(mask)


@pytest.mark.parametrize("kind", list(KINDS))
def test_questions_about_documents_are_those_of_their_split(kind: str) -> None:
    task = KINDS[kind].tasks[0]
    few = document_examples(kind, task, "development", 2)
    assert document_examples(kind, task, "development", 4)[:2] == few
    assert few != document_examples(kind, task, "test", 2)
    for example in few:
        document = make_document(kind, "development", example.number)
        assert (example.question, example.answer) in [
            (q.text, q.answer) for q in document.questions if q.task == task
        ]
        shown = document_image(kind, "development", example.number)
        assert np.array_equal(np.asarray(shown), np.asarray(document.image))
