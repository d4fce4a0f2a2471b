"""Who is compared with whom, on made-up answers."""

from __future__ import annotations

from atp_patch.evaluation.settings import UNPRUNED, Setting
from atp_patch.evaluation.summary import Measured, summarize
from tests.evaluation.test_summary import EXAMPLES, HEADER, LAYERS, TASKS, file


def test_methods_that_decide_by_themselves_are_compared_at_their_tokens() -> None:
    """With baselines, whatever their layers, that keep as many to a twentieth; not with others."""
    measured = [Measured(Setting(UNPRUNED), (file("1111", "11", (40,)),), header=HEADER)]
    for name, budget, entering, scores in (
        ("prumerge", None, (10,), ("1100", "10")),
        ("downsample", 0.25, (10,), ("1000", "00")),
        ("uniform", 0.25, (9,), ("0000", "00")),
        ("fastv", 0.25, (10,), ("0000", "00")),
    ):
        setting = Setting(name, budget=budget)
        measured.append(Measured(setting, (file(*scores, entering),), header=HEADER))
    adapter = Setting("adapter merged", adapter="merged")
    measured.append(Measured(adapter, (file("1111", "10", (10,)),), header=HEADER, hashes=("12",)))
    found = {
        r.setting.name: {name: estimate.value for name, estimate in r.against.items()}
        for r in summarize(measured, TASKS, EXAMPLES, LAYERS, "test", 50)
    }
    assert found["prumerge"] == {"downsample": 0.375}
    assert found["adapter merged"] == {"prumerge": 0.25, "downsample": 0.625, "fastv": 0.75}
    assert found[UNPRUNED] == {}


def test_compared_before_the_same_layers() -> None:
    """A baseline that prunes before other layers stands in where there is none before these."""
    early, late = {"layers": (1, 2), "budget": 0.5}, {"layers": (1, 3), "budget": 0.5}
    scores = {
        Setting("fastv", **early): ("1111", "11"),
        Setting("fastv", **late): ("1100", "11"),
        Setting("random", **early): ("1000", "00"),
        Setting("random", **late): ("0000", "00"),
        Setting("uniform", **early): ("0000", "10"),
        Setting("prumerge", budget=0.5): ("0110", "11"),
    }
    measured = [Measured(Setting(UNPRUNED), (file("1111", "11", (40,)),), header=HEADER)]
    for setting, given in scores.items():
        entering = (40, 9, 2)[: 1 + len(setting.layers)]
        measured.append(
            Measured(setting, (file(*given, entering),), (), setting.layers, header=HEADER)
        )
    found = {r.setting: r.against for r in summarize(measured, TASKS, EXAMPLES, LAYERS, "test", 50)}
    gaps = [{n: e.value for n, e in found[setting].items()} for setting in scores]
    assert gaps[0] == {"random": 1 - 0.125, "uniform": 0.75}
    assert gaps[1] == {"random": 0.75, "uniform": 0.5}
    assert gaps[3] == {"fastv": -0.75, "uniform": -0.25}
    assert gaps[5] == {"fastv": -0.25, "random": 0.625, "uniform": 0.5}


def test_adapters_are_compared_with_their_controls_and_at_their_own_tokens() -> None:
    """A budget says nothing here: what counts are layers and tokens as they were measured."""
    layers = (1, 2)
    adapter = Setting("adapter a", adapter="a")
    measured = [
        Measured(Setting(UNPRUNED), (file("1111", "11", (40,)),), header=HEADER),
        Measured(adapter, (file("1111", "10", (40, 9, 2)),), (), layers, header=HEADER),
    ]
    for name, scores, entering in (
        ("adapter a~mean", ("1100", "10"), (40, 9, 2)),
        ("adapter a~shuffled", ("1000", "10"), (40, 9, 2)),
        ("adapter b~mean", ("0000", "00"), (40, 9, 2)),
    ):
        control = name.partition("~")[2]
        setting = Setting(name, adapter=name[8], control=control)
        measured.append(Measured(setting, (file(*scores, entering),), (), layers, header=HEADER))
    for name, budget, places, entering in (
        ("fixed", 0.4, layers, (40, 10, 2)),  # 13.5 tokens of 13.25
        ("fastv", 0.3, layers, (40, 6, 2)),  # 12.5
        ("uniform", 0.3, (1, 3), (40, 5, 3)),
    ):
        setting = Setting(name, layers=places, budget=budget)
        measured.append(
            Measured(setting, (file("1000", "10", entering),), (), places, header=HEADER)
        )
    second, longer = Setting("adapter b", adapter="b"), Setting("adapter c", adapter="c")
    for setting, entering in ((second, (40, 9, 2)), (longer, (40, 12, 4))):  # 13.25 and 15
        measured.append(
            Measured(setting, (file("1100", "10", entering),), (), layers, header=HEADER)
        )
    found = {r.setting: r.against for r in summarize(measured, TASKS, EXAMPLES, LAYERS, "test", 50)}
    gaps = {name: estimate.value for name, estimate in found[adapter].items()}
    assert gaps == {"its mean": 0.25, "its shuffled": 0.375, "fixed": 0.375}
    gaps = {name: estimate.value for name, estimate in found[second].items()}
    assert gaps == {"its mean": 0.5, "adapter a": -0.25, "fixed": 0.125}
    assert not found[longer]
    assert not any(found[m.setting] for m in measured if m.setting.control is not None)
