"""Image features found once an image give what the images give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atp_patch.evaluation.prepare import ENCODED, can_see_ahead, collate, see
from atp_patch.evaluation.runner import Bench, chunks, prepared
from atp_patch.evaluation.settings import UNPRUNED, Setting, applied
from atp_patch.evaluation.tasks import choose_tasks
from tests.evaluation.conftest import TOKENS

TASKS = ["exist", "count", "background"]
SETTINGS = [Setting(UNPRUNED), Setting("atp", layers=(2, 4), budget=0.4)]


@pytest.fixture(scope="module")
def samples(bench: Bench) -> list[Any]:
    tasks = {task.name: task for task in choose_tasks(TASKS)}
    chunk = chunks(list(tasks.values()), "development", 3)[0]
    return [prepared(bench, tasks[e.task], "development", e) for e in chunk]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_features_stand_for_images(bench: Bench, samples: list[Any], setting: Setting) -> None:
    ahead = see(bench.model, samples)
    found = []
    for members, seen in ((samples, False), (ahead, True)):
        batch = collate(members, 0, False, True, seen)
        assert (ENCODED in batch.inputs) == seen
        assert ("pixel_values" in batch.inputs) != seen
        with applied(bench.model, setting, TOKENS), torch.inference_mode():
            found.append(bench.model(**batch.inputs).logits)
    rows = torch.cat([s.inputs["attention_mask"] for s in samples[:1]]).bool()
    assert rows.any()
    torch.testing.assert_close(found[0][:, -1], found[1][:, -1], atol=1e-5, rtol=0)


def test_the_tower_runs_once_an_image(bench: Bench, samples: list[Any]) -> None:
    assert can_see_ahead(bench.model, samples)
    seen: list[int] = []
    tower = bench.model.model.vision_tower
    handle = tower.register_forward_hook(lambda _m, _i, out: seen.append(len(out[0])))
    try:
        ahead = see(bench.model, samples)
    finally:
        handle.remove()
    images = {s.example.number for s in samples}
    assert len(images) < len(samples)
    assert seen == [len(images)]
    for sample in ahead:
        same = [s.features for s in ahead if s.example.number == sample.example.number]
        assert all(torch.equal(f, sample.features) for f in same)
