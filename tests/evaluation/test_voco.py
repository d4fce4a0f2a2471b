"""An image read once for all its questions gives what one pass for each question gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import atp_patch
from atp_patch.builtin import load_builtin
from atp_patch.evaluation.answers import forced
from atp_patch.evaluation.features import see
from atp_patch.evaluation.prepare import Sample, collate
from atp_patch.evaluation.runner import Bench, chunks, prepared, run
from atp_patch.evaluation.settings import UNPRUNED, Setting, applied, plan
from atp_patch.evaluation.store import RunFile
from atp_patch.evaluation.tasks import choose_tasks
from atp_patch.evaluation.voco import forced_by_image, reads_images_once
from atp_patch.patching.api import last_trace
from tests.evaluation.conftest import TOKENS, build

TASKS = ["exist", "count", "background", "ocr"]


@pytest.fixture
def trained(tmp_path: Path) -> Setting:
    """Three VoCo tokens."""
    torch.manual_seed(0)
    model = atp_patch.patch_model(build()[0], method="voco", num_tokens=3)
    atp_patch.save_pretrained(model, tmp_path / "voco3")
    planned = plan([], [], 1, {}, [2], [str(tmp_path / "voco3")])
    (setting,) = (s for s in planned if s.adapter is not None)
    return setting


def samples_of(bench: Bench) -> list[Sample]:
    """Questions about a few images."""
    tasks = {task.name: task for task in choose_tasks(TASKS)}
    chunk = chunks(list(tasks.values()), "development", 4)[0]
    samples = [prepared(bench, tasks[e.task], "development", e) for e in chunk]
    return see(bench.model, samples, bench.pad_id, True)


def test_an_image_read_once_answers_as_one_pass_does(bench: Bench, trained: Setting) -> None:
    samples = samples_of(bench)
    assert len({s.example.number for s in samples}) < len(samples)
    outputs: list[torch.Tensor] = []
    note = bench.model.register_forward_hook(lambda _m, _i, out: outputs.append(out.logits))
    with applied(bench.model, trained, TOKENS):
        assert reads_images_once(bench.model, samples)
        batch = collate(samples, bench.pad_id, False, True, seen=True)
        expected = forced(bench.model, batch)
        counts = last_trace(bench.model).tokens_per_layer
        plain = outputs[0][:, -1]
        outputs.clear()
        found = list(forced_by_image(bench.model, samples, bench.pad_id))
    note.remove()
    assert [hit for hit, _ in found] == expected
    assert torch.equal(torch.stack([left for _, left in found]), counts)
    asked = torch.cat([logits[:, -1] for logits in outputs[::2]])  # a prompt's, then an answer's
    torch.testing.assert_close(asked, plain, atol=1e-4, rtol=1e-4)


def test_images_of_several_sizes_with_2d_positions() -> None:
    bench = Bench(*load_builtin("dynamic"), speaks=True, answers="forced", sized=True)
    tasks = {task.name: task for task in choose_tasks(TASKS)}
    chunk = chunks(list(tasks.values()), "development", 4)[0]
    samples = [prepared(bench, tasks[e.task], "development", e) for e in chunk]
    samples = see(bench.model, samples, bench.pad_id, bench.flat_positions)
    assert len({s.visual_tokens for s in samples}) > 1
    torch.manual_seed(0)
    atp_patch.patch_model(bench.model, method="voco", num_tokens=16)
    assert reads_images_once(bench.model, samples)
    outputs: list[torch.Tensor] = []
    bench.model.register_forward_hook(lambda _m, _i, out: outputs.append(out.logits))
    expected = []
    for sample in samples:
        expected += forced(bench.model, collate([sample], bench.pad_id, False, False, seen=True))
    plain = torch.cat([logits[:, -1] for logits in outputs[::2]])
    outputs.clear()
    found = list(forced_by_image(bench.model, samples, bench.pad_id))
    assert [hit for hit, _ in found] == expected
    asked = torch.cat([logits[:, -1] for logits in outputs[::2]])
    torch.testing.assert_close(asked, plain, atol=1e-3, rtol=1e-4)


def test_the_tokens_read_an_image_once(bench: Bench, trained: Setting) -> None:
    samples, read = samples_of(bench), []
    layer = bench.model.get_decoder().layers[0]
    note = layer.register_forward_pre_hook(
        lambda _m, args: read.append(len(args[0])) if args[0].shape[1] > TOKENS else None
    )
    with applied(bench.model, trained, TOKENS):
        list(forced_by_image(bench.model, samples, bench.pad_id))
    note.remove()
    assert read == [1] * len({s.example.number for s in samples})


def test_only_voco_tokens_with_features_at_hand_read_once(bench: Bench, trained: Setting) -> None:
    samples = samples_of(bench)
    assert not reads_images_once(bench.model, samples)
    with applied(bench.model, Setting("uniform", layers=(2,), budget=0.5), TOKENS):
        assert not reads_images_once(bench.model, samples)
    with applied(bench.model, trained, TOKENS):
        assert not reads_images_once(bench.model, [replace(s, features=None) for s in samples])
        assert not reads_images_once(bench.model, [replace(s, answer=()) for s in samples])


def test_the_runner_counts_voco_tokens(bench: Bench, trained: Setting, tmp_path: Path) -> None:
    tasks = choose_tasks(TASKS)
    work = chunks(tasks, "development", 3)
    files = [
        (setting, RunFile.open(tmp_path, setting.name, {"setting": setting.name}, {}))
        for setting in (Setting(UNPRUNED), trained)
    ]
    run(bench, files, tasks, "development", work, lambda _n: None)
    answers = files[1][1].answers
    assert {len(of_task) for of_task in answers.values()} == {3}
    assert {answer.entering for t in answers.values() for answer in t.values()} == {(3,)}


def test_the_runner_reads_an_image_once(bench: Bench, trained: Setting, tmp_path: Path) -> None:
    tasks, read = choose_tasks(TASKS), []
    work = chunks(tasks, "development", 3)
    file = RunFile.open(tmp_path, "voco", {"setting": trained.name}, {})
    layer = bench.model.get_decoder().layers[0]
    note = layer.register_forward_pre_hook(
        lambda _m, args: read.append(len(args[0])) if args[0].shape[1] > TOKENS else None
    )
    run(bench, [(trained, file)], tasks, "development", work, lambda _n: None)
    note.remove()
    images = {example.number for chunk in work for example in chunk}
    asked = sum(map(len, work))
    assert set(read) == {1}
    assert len(images) <= len(read) <= len(images) + asked // bench.batch_size < asked
