"""Growth with the picture: fitted exponents, and the page that says from what size on it pays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from atp_patch.bench.__main__ import main
from atp_patch.bench.growth import growth_table, growths, slope
from atp_patch.bench.presets import PRESETS
from atp_patch.bench.report_page import pays_tables
from tests.bench.test_bench import SMALL

OUTPUTS = {"json": ".json", "growth-plot": ".png", "report": ".md"}


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model that takes pictures of any size."""
    monkeypatch.setitem(PRESETS, "tiny-dynamic", SMALL["qwen"][0])


def spread(median: float) -> dict[str, float]:
    return {"median": median, "q1": median, "q3": median}


def case(tokens: int, prompt: int = 40, plain_power: float = 1.5, slower: float = 1.0) -> Any:
    """A case whose plain decoder takes tokens ** power, and whose method takes half as long."""
    whole = tokens + prompt
    common = {"peak_bytes": 10**9 * whole, "decoder_ms": spread(whole**plain_power)}
    faster = 2 / slower
    pruned = {
        "peak_bytes": None,
        "decoder_ms": spread(whole**plain_power / faster),
        "overhead_ms": spread(0.1 * whole),
        "against_plain": {"pairs": [faster - 0.05, faster + 0.3], "prefill_speedup": faster},
    }
    return {
        "batch_size": 1,
        "prompt_tokens": prompt,
        "visual_tokens": tokens,
        "contenders": {"plain": {**common, "overhead_ms": None}, "fastv": pruned},
    }


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_law_has_its_exponent(power: float) -> None:
    tokens = [100, 300, 1000, 5000]
    assert slope(tokens, [7 * n**power for n in tokens]) == pytest.approx(power)


def test_the_exponent_is_the_least_squares_one() -> None:
    """Against the textbook's sums, on values that lie on no line."""
    tokens, values = [10, 100, 1000], [1.0, 5.0, 100.0]
    x, y = [math.log(n) for n in tokens], [math.log(v) for v in values]
    n, sx, sy = 3, sum(x), sum(y)
    sxy, sxx = sum(a * b for a, b in zip(x, y, strict=True)), sum(a * a for a in x)
    assert slope(tokens, values) == pytest.approx((n * sxy - sx * sy) / (n * sxx - sx**2))


def test_growth_is_fitted_over_pictures_alone() -> None:
    cases = [case(tokens) for tokens in (1000, 60, 460)] + [case(60, prompt=8), case(90, prompt=8)]
    (growth,) = growths(cases)
    assert growth["tokens"] == [100, 500, 1040]
    assert growth["contenders"]["plain"]["decoder_exponent"] == pytest.approx(1.5)
    assert growth["contenders"]["plain"]["overhead_exponent"] is None
    fastv = growth["contenders"]["fastv"]
    assert fastv["exponent_of_plain"] == pytest.approx(1)
    assert fastv["overhead_exponent"] == pytest.approx(1)
    assert "| fastv | 500.0 | 5590.2 |" in growth_table(growth)


def test_pruning_pays_from_the_size_where_it_pays_in_all_larger_ones() -> None:
    """At 90 tokens it pays by chance, and at 500 it does not."""
    cases = [case(60, slower=3), case(90), case(500, slower=2.1), case(1000)]
    lines = "\n".join(pays_tables(cases)).splitlines()
    (row,) = (line for line in lines if line.startswith("| fastv"))
    assert row == "| fastv | 0.67 | 2.00 | 0.95 | 2.00 | from 1,000 |"


@pytest.mark.usefixtures("_tiny")
@pytest.mark.slow
def test_the_command_writes_growth_plot_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--preset", "tiny-dynamic", "--runs", "1", "--decode-tokens", "0", "--device", "cpu"]
    argv += [
        "--methods",
        "random",
        "--keep",
        "0.5",
        "--image",
        "112x112,168x168,224x224",
        "--quiet",
    ]
    outputs = {name: tmp_path / f"out{ending}" for name, ending in OUTPUTS.items()}
    for name, path in outputs.items():
        argv += [f"--{name}", str(path)]
    assert main(argv) == 0
    assert "growth with the picture: batch 1" in capsys.readouterr().out
    data = json.loads(outputs["json"].read_text())
    assert [len(one["tokens"]) for one in data["growth"]] == [3]
    assert outputs["growth-plot"].read_bytes().startswith(b"\x89PNG")
    written = outputs["report"].read_text()
    assert written.startswith("# When pruning pays: tiny-dynamic")
    assert "--image 112x112,168x168,224x224" in written


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("image", ["112x112", "112x112,168x168,168x168"])
def test_two_sizes_are_too_few(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--preset", "tiny-dynamic", "--image", image, "--growth-plot", "x.png", "--quiet"]
    assert main(argv) == 2
    assert "give --image 3 sizes or more" in capsys.readouterr().err
