"""Rows against hand counts, the table of a fixed result, plots that hold every setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atp_patch.evaluation.plots import (
    by_depth,
    draw_all,
    frontier,
    kept_by_layer,
    kept_by_stratum,
)
from atp_patch.evaluation.settings import BLIND, DROPPED, UNPRUNED, Setting
from atp_patch.evaluation.statistics import Estimate
from atp_patch.evaluation.store import Answer, RunFile
from atp_patch.evaluation.summary import Measured, Row, summarize
from atp_patch.evaluation.tables import markdown, percent, table
from atp_patch.evaluation.tasks import Example, Task

LAYERS = 4
HEADER = {
    "identity": {
        "model_hash": "abc",
        "split": "test",
        "answers": "forced",
        "dtype": "float32",
        "versions": {"atp_patch": "0", "code": "c", "torch": "2", "transformers": "5"},
    },
    "model": "m",
    "machine": "one",
    "date": "today",
}


def none(*_: object) -> list[Example]:
    return []


def parity(split: str, number: int) -> int:
    assert split == "test"
    return number % 2


TASKS = [
    Task("small", "fake", none, none, stratum=parity),  # type: ignore[arg-type]
    Task("large", "fake", none, none, stratum=parity),  # type: ignore[arg-type]
]
EXAMPLES = [Example("small", n, "?", "!") for n in (0, 1, 2, 5)]
EXAMPLES += [Example("large", n, "?", "!") for n in (1, 5)]
FAST = {"layers": (1, 2), "budget": 0.5}


def file(small: str, large: str, entering: tuple[int, ...]) -> RunFile:
    """A run with these scores, and one answer beyond the questions that count."""
    answers = {"small": {9: Answer(1.0, entering)}, "large": {}}
    for example in EXAMPLES:
        scores = {"small": small, "large": large}[example.task]
        at = [e.number for e in EXAMPLES if e.task == example.task].index(example.number)
        answers[example.task][example.number] = Answer(float(scores[at]), entering)
    return RunFile(Path("none"), {}, answers)


@pytest.fixture
def rows() -> list[Row]:
    fastv, random = Setting("fastv", **FAST), Setting("random", **FAST)
    adaptive = file("1101", "11", (40, 10, 2))
    adaptive.answers["large"][5] = Answer(1.0, (40, 20, 4))
    measured = [
        Measured(Setting(UNPRUNED), (file("1111", "10", (40,)),), header=HEADER),
        Measured(Setting(BLIND), (file("1000", "00", (0,)),), header=HEADER),
        Measured(fastv, (adaptive,), (), (1, 2), header=HEADER),
        Measured(
            random,
            (file("1100", "01", (40, 10, 2)), file("1001", "00", (40, 10, 2))),
            (0, 1),
            (1, 2),
            header=HEADER,
        ),
        Measured(Setting("fastv", layers=(1, 2), budget=0.1), (), (), (1, 2), "too low", HEADER),
    ]
    return summarize(measured, TASKS, EXAMPLES, LAYERS, "test", draws=50)


def test_numbers_by_hand(rows: list[Row]) -> None:
    plain, blind, fastv, random, unreachable = rows
    assert plain.accuracy == {"small": 1.0, "large": 0.5}
    assert plain.questions == {"small": 4, "large": 2}
    assert [r.average_tokens for r in (plain, blind)] == [40, 0]
    assert plain.retention == Estimate(1.0, 1.0, 1.0)
    assert fastv.mean is not None
    assert fastv.retention is not None
    assert fastv.mean.value == pytest.approx((0.75 + 1.0) / 2)
    assert fastv.retention.value == pytest.approx((0.75 / 1.0 + 1.0 / 0.5) / 2)
    # 40 enter layer 0, 10 layer 1, 2 layers 2 and 3; one question of six keeps twice as many.
    assert fastv.tokens["small"] == (40 + 10 + 2 * 2) / 4
    assert fastv.tokens["large"] == (13.5 + (40 + 20 + 2 * 4) / 4) / 2
    assert fastv.average_tokens == pytest.approx((5 * 13.5 + 17) / 6)
    assert fastv.entering["large"] == {0: 40, 1: 15, 2: 3}
    # Five questions lie 3.5 / 6 below the mean, one 5 * 3.5 / 6 above it.
    assert fastv.spread_tokens == pytest.approx(3.5 * 5**0.5 / 6)
    assert (plain.spread_tokens, random.spread_tokens) == (0, 0)
    assert random.accuracy == {"small": 0.5, "large": 0.25}
    assert random.by_seed == [0.5, 0.25]
    assert random.seeds == (0, 1)
    assert set(fastv.against) == {"random"}
    assert fastv.against["random"].value == pytest.approx(0.875 - 0.375)
    assert random.against["fastv"].value == pytest.approx(0.375 - 0.875)
    assert unreachable.mean is None
    assert {task: e.value for task, e in fastv.by_task.items()} == fastv.accuracy
    assert 0 <= fastv.by_task["small"].low < 0.75 < fastv.by_task["small"].high <= 1


def test_tokens_in_the_layers_that_work() -> None:
    """Of four layers the first and the last change something: 40 and 2 tokens enter them."""
    plain = Measured(Setting(UNPRUNED), (file("1111", "11", (40,)),), header=HEADER)
    fastv = Measured(
        Setting("fastv", **FAST), (file("1111", "11", (40, 10, 2)),), (), (1, 2), header=HEADER
    )
    given = TASKS, EXAMPLES, LAYERS, "test", 2
    rows = summarize([plain, fastv], *given, silent=(1, 2))
    assert [row.working_tokens for row in rows] == [40, 21]
    assert [row.average_tokens for row in rows] == [40, 13.5]
    told = table(rows).splitlines()
    assert told[0].split(" | ")[4:6] == ["spread", "working"]
    assert told[3].split(" | ")[5] == "21.0"
    rows = summarize([plain, fastv], *given)
    assert [row.working_tokens for row in rows] == [40, 13.5]
    assert "working" not in table(rows)


def test_the_hash_of_every_training_is_told() -> None:
    files = tuple(file("1111", "11", (40, 10, 2)) for _ in range(2))
    plain = Measured(Setting(UNPRUNED), (file("1111", "11", (40,)),), header=HEADER)
    one, two = Setting("adapter a", adapter="a"), Setting("adapter b", adapter="b", trainings="b")
    single = Measured(one, files[:1], (), (1, 2), header=HEADER, hashes=("12",))
    several = Measured(two, files, (0, 1), (1, 2), header=HEADER, hashes=("34", "56"))
    rows = summarize([plain, single, several], TASKS, EXAMPLES, LAYERS, "test", 2)
    assert [row.to_json()["adapter_hash"] for row in rows] == [None, "12", ["34", "56"]]


def test_the_spread_of_tokens_is_within_each_training() -> None:
    """Two trainings that keep 10 and 20 tokens of everything do not tell questions apart."""
    files = tuple(file("1111", "11", (40, kept, kept)) for kept in (10, 20))
    plain = Measured(Setting(UNPRUNED), (file("1111", "11", (40,)),), header=HEADER)
    learned = Measured(Setting("adapter a", adapter="a"), files, (0, 1), (1, 2), header=HEADER)
    row = summarize([plain, learned], TASKS, EXAMPLES, LAYERS, "test", draws=2)[1]
    assert row.average_tokens == pytest.approx((17.5 + 25) / 2)
    assert row.spread_tokens == 0


def test_the_table_of_a_fixed_result() -> None:
    setting = Setting("atp", (("score", "self"),), (4, 14), 0.25)
    rows = [
        Row(
            Setting(UNPRUNED),
            "fake",
            accuracy={"small": 0.95, "large": 0.5},
            questions={"small": 4, "large": 2},
            mean=Estimate(0.725, 0.7, 0.75),
            retention=Estimate(1, 1, 1),
            average_tokens=576,
            spread_tokens=0,
            header=HEADER,
        ),
        Row(
            setting,
            "fake",
            (4, 14),
            (0, 1, 2),
            {"small": 0.9, "large": 0.25},
            mean=Estimate(0.575, 0.5, 0.65),
            retention=Estimate(float("nan"), float("nan"), float("nan")),
            against={
                "random": Estimate(0.0312, -0.01, 0.07),
                "fastv": Estimate(-0.1, -0.2, float("nan")),
            },
            average_tokens=143.9375,
            spread_tokens=12.25,
            header=HEADER,
        ),
        Row(setting, "fake", (4, 14), unreachable="least is 73", header=HEADER),
    ]
    assert table(rows).splitlines() == [
        "| method | layers | budget | tokens | spread | mean | retention "
        "| minus fastv | minus random | small | large |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
        "| unpruned | - | - | 576.0 | 0.0 | 72.5 [70.0, 75.0] | 100.0 [100.0, 100.0] | - | - "
        "| 95.0 | 50.0 |",
        "| atp (score=self, 3 seeds) | 4+14 | 0.25 | 143.9 | 12.2 | 57.5 [50.0, 65.0] | - "
        "| -10.0 [-20.0, +nan] | +3.1 [-1.0, +7.0] | 90.0 | 25.0 |",
        "| atp (score=self) | 4+14 | 0.25 | unreachable | - | - | - | - | - | - | - |",
        "",
        "- atp: least is 73",
    ]
    text = markdown(rows, "Title")
    assert text.startswith("# Title\n\nModel m (abc), split test, answers forced, float32 on one,")
    assert "\n## fake\n\nQuestions: small 4, large 2.\n\n| method" in text


def test_percentages() -> None:
    assert percent(None) == "-"
    assert percent(Estimate(0.5, float("nan"), float("nan"))) == "50.0"
    assert percent(Estimate(-0.5, -0.75, 0.25), signed=True) == "-50.0 [-75.0, +25.0]"


def test_every_task_has_a_look_of_its_own(rows: list[Row]) -> None:
    """All eleven of the built-in ones: some share a colour, and none a colour and a mark."""
    row = next(row for row in rows if row.setting.name == "fastv" and row.unreachable is None)
    counts = next(iter(row.entering.values()))
    many = replace(row, entering={f"task {k}": {**counts, 2: 3.0 + k} for k in range(11)})
    (axes,) = (axes for axes in kept_by_layer([many]).axes if axes.get_visible())
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 11


def test_plots_hold_every_setting(rows: list[Row], tmp_path: Path) -> None:
    reached = [row for row in rows if row.unreachable is None]
    labels = frontier(reached).axes[0].get_legend_handles_labels()[1]
    assert {"fastv @ 1+2", "random @ 1+2", UNPRUNED, BLIND} == set(labels)
    panels = [axes for axes in kept_by_layer(reached).axes if axes.get_visible()]
    assert [panel.get_title() for panel in panels] == ["fastv 0.5"]  # random: every task the same
    lines = {line.get_label(): line.get_ydata() for line in panels[0].lines}
    assert list(lines["large"]) == [40, 15, 3]
    alike = [row for row in reached if row.setting.name == "random"]
    panels = [axes for axes in kept_by_layer(alike).axes if axes.get_visible()]
    assert [panel.get_title() for panel in panels] == ["random 0.5"]
    written = draw_all(rows, tmp_path)
    assert [p.name for p in written] == [
        f"fake-{name}.png" for name in ("frontier", "tasks", "kept")
    ]
    assert all(p.stat().st_size > 1000 for p in written)


def test_the_plot_by_depth_runs_from_blind_to_unpruned(rows: list[Row], tmp_path: Path) -> None:
    assert by_depth(rows) is None
    plain, blind, fastv, *_ = rows
    dropped = [replace(fastv, setting=Setting(DROPPED, layers=(k,)), layers=(k,)) for k in (1, 2)]
    members = [plain, blind, *dropped]
    lines = {line.get_label(): line for line in by_depth(members).axes[0].lines}
    assert list(lines["small"].get_xdata()) == [0, 1, 2, 3]
    wanted = [row.accuracy["small"] for row in (blind, *dropped, plain)]
    assert list(lines["small"].get_ydata()) == wanted
    assert "mean" in lines
    assert "fake-depth.png" in [p.name for p in draw_all(members, tmp_path)]


def test_strata_by_hand(rows: list[Row]) -> None:
    fastv, random = rows[2], rows[3]
    # small: 0 2 | 1 5 with scores 1 0 | 1 1; large: 1 5 with scores 1 1.
    even, odd = fastv.strata[0], fastv.strata[1]
    assert (even.questions, even.accuracy) == (2, 0.5)
    assert (odd.questions, odd.accuracy) == (4, 1.0)
    assert even.entering == {0: 40, 1: 10, 2: 2}
    assert odd.entering == {0: 40, 1: 12.5, 2: 2.5}
    # Two seeds are two answers to one question: small 1100 and 1001, large 01 and 00.
    assert (random.strata[0].questions, random.strata[0].accuracy) == (2, 0.5)
    assert (random.strata[1].questions, random.strata[1].accuracy) == (4, 3 / 8)
    assert fastv.to_json()["strata"][1]["questions"] == 4


def test_the_plot_by_objects_shows_who_decides_by_itself(rows: list[Row]) -> None:
    assert kept_by_stratum(rows) is None
    rows[2].setting = replace(rows[2].setting, budget=None)
    figure = kept_by_stratum(rows)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["fastv"]
    (line, *_) = figure.axes[0].lines[1:]
    assert list(line.get_xdata()) == [0, 1]
    assert list(line.get_ydata()) == [10, 12.5]
