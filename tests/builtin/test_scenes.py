"""Scenes are reproducible, splits do not meet, and every answer is true and the only one."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from atp_patch.builtin import SPLITS, TASKS, Question, Scene, SceneConfig, make_scene
from atp_patch.builtin.glyphs import FONTS, glyph
from atp_patch.builtin.scenes import MARKS
from atp_patch.builtin.vocabulary import CHARACTERS, OBJECT_COLOURS, PLURALS, SHAPES
from workshop.labels import NOTHING, PATCH_FIELDS, patch_labels, patch_middles

SCENES = 150


def digest(scene: Scene) -> str:
    text = repr((scene.layout, scene.questions)).encode()
    return hashlib.sha256(text + scene.image.tobytes()).hexdigest()


def test_same_arguments_give_the_same_scene() -> None:
    assert digest(make_scene("test", 7)) == digest(make_scene("test", 7))


def test_scene_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import hashlib; from atp_patch.builtin import make_scene; s = make_scene('train', 5);"
        "text = repr((s.layout, s.questions)).encode();"
        "print(hashlib.sha256(text + s.image.tobytes()).hexdigest())"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not the one that runs here
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == digest(make_scene("train", 5))


def test_no_scene_is_in_two_splits() -> None:
    seen = {split: {digest(make_scene(split, k)) for k in range(SCENES)} for split in SPLITS}
    assert all(len(digests) == SCENES for digests in seen.values())
    assert not seen["train"] & seen["development"]
    assert not seen["train"] & seen["test"]
    assert not seen["development"] & seen["test"]


def test_image_is_192_rgb() -> None:
    image = make_scene("test", 0).image
    assert image.size == (192, 192)
    assert image.mode == "RGB"


def test_objects_and_plates_do_not_overlap_and_lie_inside() -> None:
    for k in range(SCENES):
        scene = make_scene("train", k, SceneConfig(min_objects=4, max_objects=9, plate_share=0.8))
        boxes = [
            (o.x_px - o.radius_px, o.y_px - o.radius_px, o.x_px + o.radius_px, o.y_px + o.radius_px)
            for o in scene.objects
        ]
        for plate in (scene.layout.sign, scene.layout.plate):
            if plate is not None:
                right, bottom = plate.x_px + plate.width_px, plate.y_px + plate.height_px
                boxes.append((plate.x_px, plate.y_px, right, bottom))
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert min(left, top) >= 0
            assert max(right, bottom) <= 192
            for other in boxes[:i]:
                apart = other[0] >= right or left >= other[2]
                apart |= other[1] >= bottom or top >= other[3]
                assert apart, (k, scene.layout)


def named(scene: Scene, phrase: str) -> list[tuple[str, str, str, int, int]]:
    """Objects that a phrase such as "red circles" or "blue object" matches."""
    singular = {plural: shape for shape, plural in PLURALS.items()}
    found = [(o.colour, o.shape, o.size, o.x_px, o.y_px) for o in scene.objects]
    for word in phrase.split():
        if word in OBJECT_COLOURS:
            found = [o for o in found if o[0] == word]
        elif word in SHAPES or word in singular:
            found = [o for o in found if o[1] == singular.get(word, word)]
        else:
            assert word in ("object", "shapes"), phrase
    return found


def the(scene: Scene, phrase: str) -> tuple[str, str, str, int, int]:
    found = named(scene, phrase)
    assert len(found) == 1, f"{phrase!r} is ambiguous"
    return found[0]


def truth(scene: Scene, question: Question) -> str:
    """The answer, found from the text alone and without the generator's own code."""
    text = question.text.rstrip("?.")
    if match := re.fullmatch(r"(?:How many|Count the) (.+?)(?: are (?:there|in the image))?", text):
        return str(len(named(scene, match[1])))
    if match := re.fullmatch(r"(?:Is|Is there|Can you see) an? (\w+ \w+?)(?: there)?", text):
        return "yes" if named(scene, match[1]) else "no"
    if match := re.fullmatch(
        r"(?:Is|Does) the (\w+ \w+) (?:lie )?(left of|right of|above|below) the (.+)", text
    ):
        _, _, _, ax, ay = the(scene, match[1])
        _, _, _, bx, by = the(scene, match[3])
        gap = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}
        assert abs(gap[match[2]]) >= 20
        return "yes" if gap[match[2]] > 0 else "no"
    if match := re.fullmatch(r"(?:Where|In which part of the image) is the (.+)", text):
        _, _, _, x, y = the(scene, match[1])
        assert min(abs(x - 96), abs(y - 96)) >= 12
        return ("top" if y < 96 else "bottom") + (" left" if x < 96 else " right")
    if match := re.fullmatch(
        r"(?:Is the (.+) small or large|(?:What size|How large) is the (.+))", text
    ):
        return the(scene, match[1] or match[2])[2]
    if "sign" in text:
        assert scene.layout.sign is not None
        return " ".join(scene.layout.sign.text)
    if "most common" in text:
        colours = [o.colour for o in scene.objects]
        most = max(colours.count(c) for c in colours)
        winners = {c for c in colours if colours.count(c) == most}
        assert len(winners) == 1
        return winners.pop()
    if "texture" in text:
        return scene.layout.texture
    if "background" in text:
        return scene.layout.background
    if match := re.fullmatch(
        r"(?:W\w+ colour (?:is|does)|Name the colour of) the (\w+)(?: have)?", text
    ):
        return the(scene, match[1])[0]
    if match := re.fullmatch(r"(?:What (?:shape )?is|Name the shape of) the (\w+ object)", text):
        return the(scene, match[1])[1]
    raise AssertionError(f"cannot read {question.text!r}")


@pytest.mark.parametrize("split", list(SPLITS))
def test_answers_agree_with_an_independent_reading(split: str) -> None:
    asked = set()
    for k in range(SCENES):
        scene = make_scene(split, k)
        for question in scene.questions:
            assert question.answer == truth(scene, question), (split, k, question)
            asked.add(question.task)
    assert asked == set(TASKS)


def test_answers_of_dense_scenes_too() -> None:
    for k in range(60):
        scene = make_scene("train", k, SceneConfig(min_objects=8, max_objects=9))
        assert all(q.answer == truth(scene, q) for q in scene.questions)


def test_scenes_are_of_all_densities_with_plates_and_signs() -> None:
    layouts = [make_scene("train", k).layout for k in range(SCENES)]
    for density in ("sparse", "medium", "dense"):
        share = sum(layout.density == density for layout in layouts) / SCENES
        assert 0.2 < share < 0.5
    assert {len(layout.objects) for layout in layouts} == set(range(9))
    both = sum(layout.sign is not None and layout.plate is not None for layout in layouts)
    assert 0.1 < both / SCENES < 0.3
    assert {x.plate.marks for x in layouts if x.plate is not None} == set(MARKS)


def test_a_plate_without_a_sign_is_not_asked_about() -> None:
    config = SceneConfig(sign_share=0.0, plate_share=1.0)
    for k in range(30):
        scene = make_scene("train", k, config, tasks=("ocr",))
        assert scene.layout.plate is not None
        assert scene.questions == ()


def test_every_task_but_ocr_is_asked_in_two_ways_at_least() -> None:
    openings: dict[str, set[str]] = {}
    for k in range(SCENES):
        for question in make_scene("train", k).questions:
            openings.setdefault(question.task, set()).add(" ".join(question.text.split()[:2]))
    assert {task: len(found) >= 2 for task, found in openings.items()} == dict.fromkeys(TASKS, True)


def test_glyphs_differ_in_every_font() -> None:
    for font in FONTS:
        inks = {glyph(c, font).tobytes() for c in CHARACTERS}
        assert len(inks) == len(CHARACTERS)


def test_each_object_has_one_core_patch_in_every_stride_two_subset() -> None:
    for k in range(40):
        layout = make_scene("train", k).layout
        labels = patch_labels(layout)[:, list(PATCH_FIELDS).index("core")].reshape(24, 24)
        for row in range(2):
            for column in range(2):
                assert np.sum(labels[row::2, column::2]) == len(layout.objects)


def test_the_middles_of_objects_are_bells_of_equal_weight() -> None:
    for k in range(40):
        layout = make_scene("train", k).layout
        near, share = (part.reshape(24, 24) for part in patch_middles(layout))
        assert set(near[share == 0].tolist()) <= {NOTHING}
        for number, item in enumerate(layout.objects):
            mine = np.where(near == number, share, 0.0)
            assert abs(mine.sum() - 4) < 0.05
            row, column = np.indices((24, 24)) + 0.5
            assert abs((mine * row).sum() / mine.sum() - item.y_px / 8) < 0.15
            assert abs((mine * column).sum() / mine.sum() - item.x_px / 8) < 0.15


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no split"):
        make_scene("validation", 0)
    with pytest.raises(ValueError, match="0 or more"):
        make_scene("test", -1)
    with pytest.raises(ValueError, match="no task"):
        make_scene("test", 0, tasks=("smell",))
    with pytest.raises(ValueError, match="max_objects"):
        SceneConfig(max_objects=10)
    with pytest.raises(ValueError, match="plate_share"):
        SceneConfig(plate_share=1.5)
