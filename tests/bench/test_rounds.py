"""Rounds of the bench: whose turn it is, what one way leaves to the next, and what is kept."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from atp_patch.bench import __main__ as bench
from atp_patch.bench import measure
from atp_patch.bench.__main__ import main
from atp_patch.bench.measure import PLAIN, Contender, compare, in_turn, patched
from tests.bench.test_bench import SMALL


def test_no_cache_of_another_way_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    preset, image, _ = SMALL["llava"]
    model = preset.build(1.0, "sdpa", "cpu", torch.float32)
    caches: list[weakref.ref[Any]] = []
    alive: list[int] = []
    prefill = measure._prefill

    def noted(*args: Any) -> Any:
        passed = prefill(*args)
        caches.append(weakref.ref(passed.cache))
        return passed

    monkeypatch.setattr(measure, "_prefill", noted)
    monkeypatch.setattr(
        measure, "reset_peak", lambda device: alive.append(sum(c() is not None for c in caches))
    )
    ways = [
        Contender(PLAIN, prunes=False),
        patched(model, "fastv", {"method": "fastv", "layers": [1], "keep": 0.5}),
    ]
    compare(model, ways, preset.inputs(image, 1, 8, seed=0), runs=1, decode_tokens=1)
    assert alive == [0, 0, 0, 0]


def test_each_round_begins_with_another_way() -> None:
    rounds = [in_turn("abc", run) for run in range(4)]
    assert ["".join(ways) for ways in rounds] == ["abc", "bca", "cab", "abc"]


def test_what_was_measured_is_kept_where_a_later_case_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    shown = iter(["one case"])
    monkeypatch.setattr(bench, "table", lambda case: next(shown))
    with pytest.raises(StopIteration):
        main(["--preset", "tiny", "--runs", "1", "--batch-size", "1,2", "--json", str(path)])
    assert [case["batch_size"] for case in json.loads(path.read_text())["cases"]] == [1]
