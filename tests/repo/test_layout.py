"""How the source is laid out: imports flow one way, public names are explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from atp_patch.evaluation import identity

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "atp_patch"
SOURCES = sorted(PACKAGE.rglob("*.py"))
WORKSHOP = sorted((ROOT / "workshop").rglob("*.py"))

# room -> rooms it may import from, besides itself: those that stand below it. A room is a folder of
# the package, an alcove of the seam, or a loose module of the top level.
_SEAM = ("host", "decoder", "learning", "door", "tower", "voco")
_PLAIN = {"contract", "maths"}
_ENGINE = _PLAIN | {"families", "methods", "seam"}
_PATCHED = _ENGINE | {"patching", "builtin", "tools", "version", "visualize", "scratch"}
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "lazy": set(),
    "scratch": set(),
    "contract": {"lazy"},
    "maths": set(),
    "families": _PLAIN,
    "methods": _PLAIN,
    "seam/host": _PLAIN,
    "seam/decoder": _PLAIN | {"seam/host"},
    "seam/learning": _PLAIN | {"seam/host", "seam/decoder"},
    "seam/door": _PLAIN | {"seam/host", "seam/decoder", "seam/learning"},
    "seam/tower": _PLAIN | {"seam/host", "seam/door"},
    "seam/voco": _PLAIN | {"seam/host", "seam/decoder", "seam/door"},
    "seam": _PLAIN | {f"seam/{alcove}" for alcove in _SEAM},
    "patching": _ENGINE | {"version"},
    "visualize": {"contract", "lazy", "patching"},
    "builtin": {"contract", "lazy", "scratch"},
    "tools": _ENGINE | {"patching", "builtin", "scratch"},
    "training": _PATCHED,
    "evaluation": _PATCHED | {"seam/host"},
    "bench": _PATCHED | {"evaluation"},
    "convert": _PATCHED,
    "integrations": _PATCHED | {"seam/decoder", "seam/tower"},
    "web": _PATCHED,
    "commands": _PATCHED | {"training", "evaluation", "bench", "convert", "integrations", "web"},
    "__init__": _PATCHED | {"lazy"},
    "demo": {"commands"},
    "evaluate": {"commands"},
    "evidence": {"commands"},
    "train": {"commands"},
    "__main__": {"commands"},
    "trained": {"tools"},
}
WITHOUT_TRANSFORMERS = {"contract", "maths", "families", "methods"}


def room_of(path: Path) -> str:
    """The room of a file: its folder, of the seam its alcove, or its own name."""
    *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
    if folders[:1] == ["seam"]:
        return "/".join(folders[:2])
    return folders[0] if folders else name


def room_of_module(name: str) -> str:
    """The room of a module of ours by its dotted name, attributes at its end or not."""
    parts = name.split(".")[1:]
    if not parts:
        return "__init__"
    if parts[0] == "seam" and len(parts) > 1 and (PACKAGE / "seam" / parts[1]).is_dir():
        return f"seam/{parts[1]}"
    known = (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file()
    return parts[0] if known else "__init__"


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
    names = imported_modules(ast.parse(source))
    return {room_of_module(name) for name in names if name.split(".")[0] == "atp_patch"}


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
        "import torch\ndef f():\n    from atp_patch.seam.host.cache import adopt\n"
        "import atp_patch\n"
    )
    assert rooms_imported(source) == {"seam/host", "__init__"}


def test_every_room_has_its_row() -> None:
    assert {room_of(path) for path in SOURCES} == set(ALLOWED)


def test_no_arrow_leads_back() -> None:
    """The table itself has no circle: every room stands on rooms that stand below it."""
    left = dict(ALLOWED)
    while left:
        free = {room for room, below in left.items() if not below & left.keys()}
        assert free, f"these rooms stand on each other: {sorted(left)}"
        left = {room: below for room, below in left.items() if room not in free}


def test_every_room_is_on_the_page_of_rooms() -> None:
    """A room of the top level is drawn as its folder, and a loose module is named."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, drawing, rest = page.split("```", 2)
    tops = {room.split("/")[0] for room in ALLOWED} - {"__init__"}
    folders = {room for room in tops if (PACKAGE / room).is_dir()}
    assert not [room for room in sorted(folders) if not re.search(rf"\b{room}/", drawing)]
    assert not [room for room in sorted(tops - folders) if f"`{room}.py`" not in rest]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_flow_one_way(room: str) -> None:
    for path in (path for path in SOURCES if room_of(path) == room):
        wrong = rooms_imported(path.read_text(encoding="utf-8")) - ALLOWED[room] - {room}
        assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}"


def test_the_package_does_without_the_workshop() -> None:
    assert WORKSHOP
    for path in SOURCES:
        names = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        assert "workshop" not in {name.split(".")[0] for name in names}, path.relative_to(ROOT)


@pytest.mark.parametrize("room", sorted(WITHOUT_TRANSFORMERS))
def test_only_the_seam_and_what_stands_on_it_know_transformers(room: str) -> None:
    for path in (path for path in SOURCES if room_of(path) == room):
        names = {
            name.split(".")[0] for name in imported_modules(ast.parse(path.read_text("utf-8")))
        }
        assert "transformers" not in names, path.relative_to(ROOT)


@pytest.mark.parametrize("path", SOURCES + WORKSHOP, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_public_is_explained(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no module docstring"
    assert list(public_without_docstring(tree)) == []


def test_the_hash_of_code_is_of_files_that_there_are() -> None:
    """A file that moved would drop out of the hash without a word."""
    assert all(any(identity.PACKAGE.glob(pattern)) for pattern in identity.CODE)


def test_no_setting_is_in_both_configuration_files() -> None:
    setup, project = (ROOT / "setup.cfg").read_text(), (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^\[project\]", project, re.MULTILINE) is None
    tools = set(re.findall(r"^\[tool\.([a-z]+)", project, re.MULTILINE))
    assert tools == {"ruff", "mypy", "pytest"}
    assert re.findall(r"^\[(tool|ruff|mypy|flake8|isort|pytest)", setup, re.MULTILINE) == []
