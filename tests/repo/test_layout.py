"""How the source is laid out: imports flow one way, files are short, public names are explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "atp_patch"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300

# room -> rooms it may import from besides itself; rooms not named stand on patch and may use all
ALLOWED = {
    "errors": set(),
    "types": set(),
    "vision": set(),
    "maths": set(),
    "arguments": {"errors"},
    "families": {"errors", "types", "vision"},
    "methods": {"arguments", "errors", "types", "vision", "maths"},
    "seam": {"errors", "types", "vision", "maths"},
    "config": {"arguments", "errors", "maths"},
    "sharing": {"errors", "config", "maths", "vision"},
    "trace": {"types", "maths"},
    "hub": {"errors", "config", "methods"},
    "pruner": {
        "errors",
        "types",
        "vision",
        "maths",
        "config",
        "trace",
        "families",
        "methods",
        "seam",
        "sharing",
    },
    "compression": {"errors", "config", "trace", "families", "methods", "seam", "pruner"},
    "patch": {
        "arguments",
        "errors",
        "compression",
        "config",
        "trace",
        "hub",
        "families",
        "methods",
        "seam",
        "pruner",
    },
}
WITHOUT_TRANSFORMERS = {
    "arguments",
    "errors",
    "types",
    "vision",
    "maths",
    "families",
    "methods",
    "config",
    "sharing",
    "trace",
}


def room_of(path: Path) -> str:
    """The room of a file: its folder under the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source: str) -> set[str]:
    """Rooms of ours that a source imports from."""
    parts = (name.split(".") for name in imported_modules(ast.parse(source)))
    return {"__init__" if len(p) == 1 else p[1] for p in parts if p[0] == "atp_patch"}


def public_without_docstring(tree: ast.Module) -> Iterator[str]:
    """Names of public functions, classes and methods without a docstring; overrides excepted."""

    def visit(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef)) or child.name.startswith("_"):
                continue
            overloads = {ast.unparse(d).split(".")[-1] for d in child.decorator_list}
            if ast.get_docstring(child) is None and not overloads & {"override", "overload"}:
                yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")

    return visit(tree, "")


def test_the_rules_see_an_import_the_wrong_way() -> None:
    source = (
        "import torch\ndef f():\n    from atp_patch.seam.cache import adopt\nimport atp_patch\n"
    )
    assert rooms_imported(source) == {"seam", "__init__"}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_flow_one_way(room: str) -> None:
    files = [path for path in SOURCES if room_of(path) == room]
    assert files, f"no room {room}; the table above is out of date"
    for path in files:
        wrong = rooms_imported(path.read_text(encoding="utf-8")) - ALLOWED[room] - {room}
        assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}"


@pytest.mark.parametrize("room", sorted(WITHOUT_TRANSFORMERS))
def test_only_the_seam_and_what_stands_on_patch_know_transformers(room: str) -> None:
    for path in (path for path in SOURCES if room_of(path) == room):
        names = {
            name.split(".")[0] for name in imported_modules(ast.parse(path.read_text("utf-8")))
        }
        assert "transformers" not in names, path.relative_to(ROOT)


def test_nothing_under_patch_is_imported_by_the_built_in_model() -> None:
    for path in (path for path in SOURCES if room_of(path) == "builtin"):
        wrong = rooms_imported(path.read_text(encoding="utf-8")) & {"seam", "families", "methods"}
        assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}"


def test_files_fit_in_the_head() -> None:
    files = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *(ROOT / "examples").glob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES}
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_public_is_explained(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no module docstring"
    assert list(public_without_docstring(tree)) == []


def test_no_setting_is_in_both_configuration_files() -> None:
    setup, project = (ROOT / "setup.cfg").read_text(), (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^\[project\]", project, re.MULTILINE) is None
    tools = set(re.findall(r"^\[tool\.([a-z]+)", project, re.MULTILINE))
    assert tools == {"ruff", "mypy", "pytest"}
    assert re.findall(r"^\[(tool|ruff|mypy|flake8|isort|pytest)", setup, re.MULTILINE) == []
