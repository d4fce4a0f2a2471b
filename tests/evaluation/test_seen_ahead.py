"""Image features found once an image give what the images give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from atp_patch.builtin import DYNAMIC, load_builtin
from atp_patch.evaluation.answers import forced
from atp_patch.evaluation.features import can_see_ahead, see, seen_by
from atp_patch.evaluation.prepare import ENCODED, PICTURE, Sample, collate
from atp_patch.evaluation.runner import Bench, chunks, prepared
from atp_patch.evaluation.settings import UNPRUNED, Setting, applied
from atp_patch.evaluation.tasks import choose_tasks
from atp_patch.patching.api import last_trace
from tests.evaluation.conftest import TOKENS

TASKS = ["exist", "count", "background"]
INSIDE = [Setting(UNPRUNED), Setting("atp", layers=(2, 4), budget=0.4)]
MERGED = [
    Setting("prumerge"),
    Setting("prumerge+", budget=0.4),
    Setting("prumerge+/atp", layers=(2, 4), budget=0.4),
]


def questions(bench: Bench, number: int) -> list[Sample]:
    """The first chunk of a few images."""
    tasks = {task.name: task for task in choose_tasks(TASKS)}
    chunk = chunks(list(tasks.values()), "development", number)[0]
    return [prepared(bench, tasks[e.task], "development", e) for e in chunk]


@pytest.fixture(scope="module")
def samples(bench: Bench) -> list[Sample]:
    return questions(bench, 3)


@pytest.fixture(scope="module")
def dynamic() -> Bench:
    model, processor = load_builtin(DYNAMIC)
    return Bench(model, processor, speaks=True, answers="forced", sized=True)


def compare(bench: Bench, samples: Sequence[Sample], setting: Setting, tokens: int) -> None:
    """What the setting makes of the images and of their features."""
    ahead = see(bench.model, samples, bench.pad_id, bench.flat_positions)
    found, told, kept = [], [], []
    with applied(bench.model, setting, tokens), torch.inference_mode():
        ahead = list(seen_by(bench.model, ahead, bench.pad_id, bench.flat_positions))
        for members, seen in ((samples, False), (ahead, True)):
            batch = collate(members, bench.pad_id, False, bench.flat_positions, seen)
            assert (ENCODED in batch.inputs) == seen
            assert (PICTURE in batch.inputs) != seen
            found.append(bench.model(**batch.inputs).logits[:, -1])
            told.append(forced(bench.model, batch))
            if setting.name != UNPRUNED:
                kept.append(last_trace(bench.model).tokens_per_layer)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    assert told[0] == told[1]
    assert not kept or torch.equal(kept[0], kept[1])
    assert not kept or int(kept[0][:, -1].max()) < tokens


@pytest.mark.parametrize("setting", INSIDE + MERGED, ids=lambda s: s.name)
def test_features_stand_for_images(bench: Bench, samples: list[Sample], setting: Setting) -> None:
    compare(bench, samples, setting, TOKENS)


@pytest.mark.parametrize("setting", INSIDE + MERGED, ids=lambda s: s.name)
def test_features_stand_for_images_of_several_sizes(dynamic: Bench, setting: Setting) -> None:
    for sample in (found := questions(dynamic, 2)):
        assert can_see_ahead(dynamic.model, [sample])
    for tokens in {sample.visual_tokens for sample in found}:
        compare(dynamic, [s for s in found if s.visual_tokens == tokens], setting, tokens)


def test_the_tower_runs_once_an_image(bench: Bench, samples: list[Sample]) -> None:
    assert can_see_ahead(bench.model, samples)
    seen: list[int] = []
    tower = bench.model.model.vision_tower
    handle = tower.register_forward_hook(lambda _m, _i, out: seen.append(len(out[0])))
    try:
        ahead = see(bench.model, samples, bench.pad_id, True)
    finally:
        handle.remove()
    images = {s.example.number for s in samples}
    assert len(images) < len(samples)
    assert seen == [len(images)]
    for sample in ahead:
        same = [s.features for s in ahead if s.example.number == sample.example.number]
        assert all(torch.equal(f, sample.features) for f in same)


def test_shrunk_images_are_not_seen_ahead(bench: Bench, samples: list[Sample]) -> None:
    ahead = see(bench.model, samples, bench.pad_id, True)
    with applied(bench.model, Setting("downsample", budget=0.3), TOKENS):
        left: Any = seen_by(bench.model, ahead, bench.pad_id, True)
    assert all(sample.features is None for sample in left)
