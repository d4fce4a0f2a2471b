"""The examples of docs/add_method.md, run as printed, and the options in docs/methods.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.contract import DoorMethod
from atp_patch.methods import METHODS, method_class
from tests.families.kinds import MIXED, make
from tests.families.tables import EVERY
from tests.helpers import inputs as made
from tests.helpers.run import forward
from tests.helpers.tiny import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "add_method.md"
FAMILIES = ("llava", "qwen2_5_vl", "internvl", "gemma3")


def blocks() -> dict[str, str]:
    """Name of the class that it defines -> the source of each example."""
    page = PAGE.read_text(encoding="utf-8")
    sources = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return {re.findall(r"^class (\w+)", source, re.MULTILINE)[-1]: source for source in sources}


def run(name: str, model: Any) -> dict[str, Any]:
    """The names that an example leaves; examples before it have made their imports."""
    space: dict[str, Any] = {"model": model}
    for source in blocks().values():
        exec("\n".join(re.findall(r"^(?:from|import) .*$", source, re.MULTILINE)), space)
    exec(blocks()[name], space)
    return space


def test_there_is_one_for_each_kind() -> None:
    found = {name: run(name, tiny_model("llava-llama"))[name].where for name in blocks()}
    assert set(found.values()) == {"picture", "tower", "door", "layer"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("Asked", {0: 9}),
        ("Seen", {0: 10}),
        ("Remembers", {2: 18, 4: 9, 6: 4}),
        ("Bright", {0: 18}),
        ("Shrunk", {0: 9}),
    ],
)
def test_it_keeps_what_it_says(name: str, kept: dict[int, int], tmp_path: Path) -> None:
    model = tiny_model("llava-llama")
    run(name, model)
    inputs = made.batch(model, made.SINGLE)
    logits = forward(model, inputs).logits
    trace = atp_patch.last_trace(model)
    assert {layer: trace.layers[layer].kept_counts for layer in trace.layers} == {
        layer: (count,) for layer, count in kept.items()
    }
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(tiny_model("llava-llama"), weights=tmp_path)
    assert torch.equal(forward(again, inputs).logits, logits)


def test_every_example_has_its_row() -> None:
    assert set(blocks()) == {"Asked", "Seen", "Remembers", "Bright", "Shrunk"}


def test_the_options_and_their_defaults_are_those_of_the_classes() -> None:
    page = (PAGE.parent / "methods.md").read_text(encoding="utf-8")
    section = page.partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \|", section, re.MULTILINE)
    assert len(rows) > 15
    for names, given in rows:
        for name in re.findall(r"`([^`]+)`", names):
            defaults = {field.name: field.default for field in fields(method_class(name))}
            for option, default in re.findall(r"`(\w+)` \(`([^`]+)`\)", given):
                assert defaults[option] == ast.literal_eval(default), f"{name}: {option}"
    told = set(re.findall(r"`(\w+)`", section))
    # The rest of atp's are for training, and stand in the docstring of its class.
    of_all = {f.name for kind in METHODS if kind.name != "atp" for f in fields(kind)}
    assert of_all <= told


def test_the_page_says_which_methods_read_the_question() -> None:
    """And what an evaluation reads once for all questions about an image."""
    page = (PAGE.parent / "methods.md").read_text(encoding="utf-8")
    section = page.partition("\n## What each needs and costs\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    told = {name: row[5] for row in cells for name in re.findall(r"`([\w+]+)`", row[0])}
    assert set(told) == {kind.name for kind in METHODS}
    doors = [kind for kind in METHODS if issubclass(kind, DoorMethod)]
    assert len(doors) > 7
    for kind in doors:
        assert (told[kind.name] == "no") != kind.reads_question, kind.name


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The first example as another package that is installed; gives the name of its method."""
    source = blocks()["Asked"].partition("\n\n\natp_patch.patch_model")[0]
    assert len(source.splitlines()) <= 25
    # A name that no class of this process has, so that the package's is found.
    name = f"asked-in-{tmp_path.name}"
    source = source.replace('name = "asked"', f'name = "{name}"')
    (tmp_path / "asking.py").write_text(source, encoding="utf-8")
    info = tmp_path / "asking-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: asking\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[atp_patch.methods]\n{name} = asking:Asked\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop("asking", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_door_method_of_another_package_serves_any_family(package: str, family: str) -> None:
    (kind,) = (kind for kind in EVERY if kind.name == family)
    assert package in atp_patch.available_methods()
    model = atp_patch.patch_model(kind.build(), method=package, keep=0.25)
    assert "asking" in sys.modules
    forward(model, make(kind, MIXED).inputs)
    trace = atp_patch.last_trace(model)
    assert trace.layers[0].kept_counts == tuple(
        max(round(total / 4), min(total, 1)) for total in trace.layout.totals
    )
    # The choice is the page's: the most alike by the scores that the trace shows.
    for b, total in enumerate(trace.layout.totals):
        places = trace.layout.position[b, :total]
        scores = trace.layers[0].scores["alike"][b, places]
        kept = trace.layers[0].kept[b, places]
        if 0 < int(kept.sum()) < total:
            assert scores[kept].min() >= scores[~kept].max()
