"""The notebooks in examples/: their names are there, they hold no outputs, and they run."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import atp_patch
from atp_patch import visualize

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    """The cells with code."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(path: Path) -> list[Any]:
    """Run a notebook in this process; return the last value of each cell that ends with one."""
    names: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for number, cell in enumerate(cells(path)):
        tree = ast.parse("".join(cell["source"]), f"{path.name}, cell {number}")
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, f"{path.name}, cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            values.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    return values


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["own_method", "tour"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_is_sound_and_no_output_is_stored(path: Path) -> None:
    modules: dict[str, ModuleType] = {"atp_patch": atp_patch, "visualize": visualize}
    used = 0
    for cell in cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                assert module is None or hasattr(module, node.attr), ast.unparse(node)
                used += module is not None
    assert used > 4


@pytest.mark.slow
def test_the_tour_shows_what_it_says() -> None:
    image, plain, pruned, trace, *drawings, plain_again = run(FOLDER / "tour.ipynb")
    assert image.size == (192, 192)
    assert plain.strip() == pruned.strip() == plain_again.strip() == "1"
    assert "before layer" in trace._repr_html_()
    assert "<img" in trace._repr_html_()
    assert len(drawings) == 4
    assert all(drawing.png().startswith(b"\x89PNG") for drawing in drawings)


@pytest.mark.slow
def test_the_method_of_ones_own_prunes() -> None:
    overlay, heat, right = run(FOLDER / "own_method.ipynb")
    assert "before the decoder: 144 of 576" in overlay.svg()
    assert "unlike" in heat.svg()
    assert list(right) == ["stands_out", "divprune", "downsample"]
    assert all(text.endswith((" of 10", " of 11")) for text in right.values())
