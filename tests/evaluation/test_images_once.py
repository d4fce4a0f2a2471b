"""An image read once for all its questions gives what one pass for each question gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from atp_patch.builtin import DYNAMIC, load_builtin
from atp_patch.evaluation.answers import forced
from atp_patch.evaluation.features import see, seen_by
from atp_patch.evaluation.images_once import keeps_the_same
from atp_patch.evaluation.prepare import Sample, collate
from atp_patch.evaluation.runner import Bench, answered, chunks, prepared, run
from atp_patch.evaluation.settings import UNPRUNED, Setting, applied
from atp_patch.evaluation.store import RunFile
from atp_patch.evaluation.tasks import Task, choose_tasks
from atp_patch.patching.api import last_trace
from tests.evaluation.conftest import TOKENS

TASKS = ["exist", "count", "background"]
AT_ONCE = [
    Setting(UNPRUNED),
    Setting("fastervlm", budget=0.4),
    Setting("scope", budget=0.2),  # reads what the tower showed the method before
    Setting("visionzip", budget=0.4),
    Setting("hiprune", budget=0.4),
    Setting("divprune", budget=0.4),
    Setting("prumerge+", budget=0.4),
    Setting("downsample", budget=0.3),
]
EACH = [Setting("vscan", layers=(4,), budget=0.4), Setting("cdpruner", budget=0.4)]


def questions(bench: Bench, number: int) -> tuple[dict[str, Task], list[Sample]]:
    tasks = {task.name: task for task in choose_tasks(TASKS)}
    work = chunks(list(tasks.values()), "development", number)
    asked = [example for chunk in work for example in chunk]
    return tasks, [prepared(bench, tasks[e.task], "development", e) for e in asked]


def _count(passes: list[int], *_: Any) -> None:
    passes.append(1)


def compare(bench: Bench, settings: list[Setting], tokens: int, number: int) -> list[list[bool]]:
    """Hits and counts of each setting with images read ahead, and without; gives the hits."""
    tasks, found = questions(bench, number)
    samples = [sample for sample in found if sample.visual_tokens == tokens]
    images = {sample.example.number for sample in samples}
    assert 1 < len(images) < len(samples)
    ahead = see(bench.model, samples, bench.pad_id, bench.flat_positions)
    told = []
    for setting in settings:
        with applied(bench.model, setting, tokens):
            batch = collate(samples, bench.pad_id, False, bench.flat_positions)
            expected = forced(bench.model, batch)
            counts = [tokens] * len(samples)
            if setting.name != UNPRUNED:
                counts = last_trace(bench.model).tokens_per_layer[:, 0].tolist()
                assert counts[0] < tokens
            passes: list[int] = []
            note = bench.model.register_forward_hook(partial(_count, passes))
            given = seen_by(bench.model, ahead, bench.pad_id, bench.flat_positions)
            made = list(answered(bench, setting, tasks, given))
            note.remove()
            # One pass reads the images, and two more a batch ask and answer.
            batches = -(-len(samples) // bench.batch_size)
            assert len(passes) == 2 * batches + keeps_the_same(bench.model)
            assert keeps_the_same(bench.model) == (setting not in EACH)
        assert [sample.example for sample, _ in made] == [sample.example for sample in samples]
        assert [answer.score for _, answer in made] == [float(hit) for hit in expected]
        assert [answer.entering[0] for _, answer in made] == counts
        told.append(expected)
    return told


def test_images_read_once_answer_as_one_pass_each_does(bench: Bench) -> None:
    bench.images_once.forget()
    told = compare(bench, AT_ONCE + EACH, TOKENS, 4)
    assert any(hits != told[0] for hits in told), "mixing settings up would not show"


def test_logits_behind_read_images_are_those_of_one_pass(bench: Bench) -> None:
    _, samples = questions(bench, 4)
    outputs: list[torch.Tensor] = []
    note = bench.model.register_forward_hook(lambda _m, _i, out: outputs.append(out.logits))
    try:
        for setting in AT_ONCE:
            with applied(bench.model, setting, TOKENS):
                forced(bench.model, collate(samples, bench.pad_id, False, True))
                images = bench.images_once.read(bench.model, samples, bench.pad_id, True)
                images.hits(samples, bench.pad_id)
            plain, _, _, asked, _ = outputs
            torch.testing.assert_close(asked[:, -1], plain[:, -1], atol=1e-4, rtol=1e-4)
            outputs.clear()
    finally:
        note.remove()
        bench.images_once.forget()


def test_images_of_several_sizes_with_2d_positions() -> None:
    model, processor = load_builtin(DYNAMIC)
    bench = Bench(model, processor, speaks=True, answers="forced", sized=True)
    _, found = questions(bench, 5)
    sizes = [sample.visual_tokens for sample in found]
    tokens = max(set(sizes), key=sizes.count)
    compare(bench, [Setting("scope", budget=0.2), *AT_ONCE[:2], *EACH], tokens, 5)


def test_the_tower_shows_its_attention_once(bench: Bench) -> None:
    tasks, samples = questions(bench, 4)
    ahead = see(bench.model, samples, bench.pad_id, True)
    seen: list[int] = []
    tower: Any = bench.model.model.vision_tower
    note = tower.register_forward_hook(lambda _m, _i, out: seen.append(len(out[0])))
    bench.images_once.forget()
    try:
        for setting in AT_ONCE[1:4]:
            with applied(bench.model, setting, TOKENS):
                list(answered(bench, setting, tasks, ahead))
    finally:
        note.remove()
        bench.images_once.forget()
    assert seen == [len({sample.example.number for sample in samples})]


def test_methods_that_read_the_tower_are_evaluated(bench: Bench, tmp_path: Path) -> None:
    """They had been given features in place of images, so that the tower had shown them nothing."""
    tasks = choose_tasks(TASKS)
    work = chunks(tasks, "development", 2)
    settings = [Setting("fastervlm", budget=0.4), Setting("vscan", layers=(4,), budget=0.4)]
    runs = [(s, RunFile.open(tmp_path, s.name, {"name": s.name}, {})) for s in settings]
    run(bench, runs, tasks, "development", work, lambda count: None)
    for _, file in runs:
        assert all(file.has(e.task, e.number) for chunk in work for e in chunk)
