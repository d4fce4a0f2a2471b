"""Oracle budgets and the recall of evidence, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from atp_patch import evidence as command
from atp_patch.builtin.documents import Box, DocumentQuestion, make_document
from atp_patch.contract.errors import ConfigError, InputError
from atp_patch.evaluation.documents import document_examples
from atp_patch.evaluation.evidence import (
    Need,
    evidence_mask,
    kept_evidence,
    needs,
    recalls,
    spread,
)
from atp_patch.evaluation.evidence_command import recall_table
from atp_patch.evaluation.prepare import collate
from atp_patch.evaluation.runner import Bench, prepared
from atp_patch.evaluation.settings import Setting, applied
from atp_patch.evaluation.tasks import choose_tasks
from atp_patch.patching.api import last_trace

RANDOM = Setting("random", layers=(1, 4), budget=0.5, seed=0)


@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (4, 5), (13, 1)])
def test_a_token_shows_evidence_where_it_meets_a_box(rows: int, columns: int) -> None:
    width, height = 90, 60
    boxes = (Box(0, 0, 1, 1), Box(29, 10, 41, 20), Box(80, 55, 90, 60))
    mask = evidence_mask(DocumentQuestion("title", "?", "a", boxes), (width, height), rows, columns)
    seen = np.zeros((height, width), dtype=bool)
    for box in boxes:
        seen[box.top : box.bottom, box.left : box.right] = True
    for y in range(height):
        for x in range(width):
            if seen[y, x]:
                assert mask[y * rows // height, x * columns // width]
    assert mask.sum() <= seen.sum()
    assert not evidence_mask(DocumentQuestion("title", "?", "a"), (9, 9), rows, columns).any()


def test_the_mask_is_that_of_the_generator_where_tokens_are_squares() -> None:
    document = make_document("table", "development", 3)
    width, height = document.image.size
    for question in document.questions:
        mask = evidence_mask(question, (width, height), height // 16, width // 16)
        found = {(int(row), int(column)) for row, column in np.argwhere(mask)}
        assert found == question.evidence_tokens(width, height, 16)


def test_needs_are_spread_over_tasks() -> None:
    found = [Need("a", 1, 10), Need("a", 3, 10), Need("b", 10, 10)]
    shares = spread(found)
    assert list(shares) == ["a", "b", "all"]
    assert shares["a"] == pytest.approx((0.11, 0.15, 0.2, 0.25, 0.29))
    assert shares["b"] == (1.0,) * 5
    assert shares["all"][2] == pytest.approx(0.3)


def test_recall_is_the_share_of_evidence_that_enters_a_layer(bench: Bench) -> None:
    (task,) = choose_tasks(["map/places"])
    (example,) = task.examples("development", 1)
    sample = prepared(bench, task, "development", example)
    inputs = collate([sample], bench.pad_id, False, bench.flat_positions).inputs
    with torch.inference_mode(), applied(bench.model, RANDOM, sample.visual_tokens):
        bench.model(**inputs)
        trace = last_trace(bench.model)
    grid = trace.grids[0][0]
    mask = np.zeros((grid.height, grid.width), dtype=bool)
    mask[1:3, 2:5] = True
    positions = [grid.start + row * grid.width + column for row in (1, 2) for column in (2, 3, 4)]
    found = kept_evidence(trace, [mask])
    assert list(found) == [1, 4]
    for layer, (one,) in found.items():
        kept = trace.layers[layer].kept[0]
        assert one[0] == pytest.approx(trace.layers[layer].kept_counts[0] / grid.length)
        assert one[1] == pytest.approx(sum(bool(kept[at]) for at in positions) / 6)
    assert 0 < found[4][0][1] < 1
    with pytest.raises(InputError, match="one image of 2 rows"):
        kept_evidence(trace, [mask[:2]])


def test_every_setting_is_measured_at_each_of_its_layers(bench: Bench) -> None:
    tasks = choose_tasks(["map/places", "chart"])
    everything = Setting("random", layers=(1, 4), budget=1.0, seed=0)
    told: list[int] = []
    settings = [everything, RANDOM]
    found = list(recalls(bench, settings, tasks, "development", 1, told.append))
    assert sum(told) == len(tasks) * len(settings)
    assert len(found) == len(tasks) * 2 * 2
    for one in found:
        if one.setting == everything:
            assert (one.tokens, one.recall) == (1.0, 1.0)
    by_layer = {layer: [r.recall for r in found if r.layer == layer] for layer in (1, 4)}
    assert all(one >= other for one, other in zip(by_layer[1], by_layer[4], strict=True))
    rows = recall_table(found).splitlines()[4:]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| random", "100%", "1"],
        ["| random", "100%", "4"],
        ["| random", "50%", "1"],
        ["| random", "50%", "4"],
    ]


def test_the_command_prints_budgets_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evidence.jsonl"
    assert command.main(["--tasks", "chart/trend", "--questions", "2", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| chart/trend | 2 |" in table
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    numbers = [example.number for example in document_examples("chart", "trend", "development", 2)]
    for line, number in zip(lines, numbers, strict=True):
        document = make_document("chart", "development", number)
        (question,) = (q for q in document.questions if q.task == "trend")
        width, height = document.image.size
        assert line["tokens"] == (width // 16) * (height // 16)
        assert line["needed"] == len(question.evidence_tokens(width, height, 16))


def test_tasks_without_evidence_and_models_that_cannot_read_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"ocr: evidence is known for tasks about documents"):
        needs(choose_tasks(["ocr"]), "development", 1, 16)
    argv = ["--tasks", "chart/trend", "--questions", "1", "--model", str(folder)]
    assert command.main(argv) == 2
    assert "knows the words of scenes alone" in capsys.readouterr().err
    assert command.main(["--token-px", "0"]) == 2
    assert "--token-px 0 must be at least 1" in capsys.readouterr().err
