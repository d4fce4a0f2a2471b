"""Layers before the first pruning run once a batch, and give every setting the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from atp_patch.evaluation.answers import forced
from atp_patch.evaluation.layers_once import LayersOnce
from atp_patch.evaluation.prepare import Batch, Sample, collate
from atp_patch.evaluation.runner import Bench, chunks, prepared
from atp_patch.evaluation.settings import DROPPED, Setting, applied
from atp_patch.evaluation.tasks import choose_tasks
from tests.evaluation.conftest import TOKENS

SETTINGS = [
    Setting("uniform", layers=(3, 5), budget=0.5),
    Setting("atp", layers=(3, 5), budget=0.5),  # scores layer 2, which ran unscored before
    Setting("fastv", layers=(3, 5), budget=0.45),
    Setting("sparsevlm", layers=(2, 4), budget=0.4),
    Setting("atp", layers=(4, 6), budget=0.6),
    Setting("prumerge+/atp", layers=(3, 5), budget=0.4),
    Setting(DROPPED, layers=(5,)),
]


@pytest.fixture(scope="module")
def batches(bench: Bench) -> list[Batch]:
    tasks = {task.name: task for task in choose_tasks(["exist", "count"])}
    chunk = chunks(list(tasks.values()), "development", 3)[0]
    samples: list[Sample] = [prepared(bench, tasks[e.task], "development", e) for e in chunk]
    return [collate(samples[at : at + 3], 0, False, True) for at in (0, 3)]


def read(
    bench: Bench, batches: Sequence[Batch], setting: Setting, shared: LayersOnce | None
) -> list[Tensor]:
    """Logits of each batch, those of a true answer fed on the cache, and hits."""
    found: list[Tensor] = []
    model = bench.model
    note = model.register_forward_hook(lambda _m, _i, out: found.append(out.logits))
    with applied(model, setting, TOKENS):
        for number, batch in enumerate(batches):
            if shared is None:
                hits = forced(model, batch)
            else:
                shared.batch = number
                with shared.given_again(model, ()):
                    hits = forced(model, batch)
            found.append(torch.tensor(hits))
    note.remove()
    return found


def test_every_setting_gets_the_same_bits(bench: Bench, batches: list[Batch]) -> None:
    shared = LayersOnce()
    for setting in SETTINGS:
        plain = read(bench, batches, setting, None)
        again = read(bench, batches, setting, shared)
        assert len(plain) == len(again) == 3 * len(batches)
        for one, other in zip(plain, again, strict=True):
            assert torch.equal(one, other), setting
    assert all("forward" not in vars(layer) for layer in bench.model.get_decoder().layers)


def test_layers_run_once_a_batch(bench: Bench, batches: list[Batch]) -> None:
    shared = LayersOnce()
    layers = bench.model.get_decoder().layers
    runs: list[int] = []
    notes: list[Any] = [
        layer.mlp.register_forward_hook(
            lambda _m, _i, out, n=n: runs.append(n) if out.shape[1] > TOKENS else None
        )
        for n, layer in enumerate(layers)
    ]
    read(bench, batches, SETTINGS[1], shared)
    assert [runs.count(n) for n in range(3)] == [2, 2, 2]
    read(bench, batches, SETTINGS[2], shared)
    assert [runs.count(n) for n in range(3)] == [2, 2, 2]
    shared.forget()
    read(bench, batches, SETTINGS[2], shared)
    assert [runs.count(n) for n in range(3)] == [4, 4, 4]
    for note in notes:
        note.remove()
