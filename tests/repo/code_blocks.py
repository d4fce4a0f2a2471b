"""The code that pages show, and what a block must hold that is not run."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A fence with this behind its language holds code that a test checks and does not run. The site
# would take any other word there for text.
MARK = "{not-run}"
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: as the fence names it.
        runs: whether the block is run; False where its fence has the mark.
        source: its text.
    """

    language: str
    runs: bool
    source: str


def pages() -> list[Path]:
    """The pages of the documentation, the README first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of one language on a page, in order."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    assert {info.strip() for _, info, _ in found} <= {"", MARK}, page
    return [
        Block(name, info.strip() != MARK, source)
        for name, info, source in found
        if name == language
    ]


def inline(page: Path) -> list[str]:
    """The pieces of code within a page's sentences and tables."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def commands(page: Path) -> list[str]:
    """The command lines of a page's shell blocks, without comments; continued lines are joined."""
    sources = [block.source for name in ("sh", "bash") for block in blocks(page, name)]
    lines = "\n".join(sources).replace("\\\n", "").splitlines()
    bare = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [line for line in bare if line]


def faults(source: str) -> list[str]:
    """What is wrong with code that cannot run here: names that are imported and do not exist, and
    keywords that a function does not take.

    Raises:
        SyntaxError: where it is no Python.
    """
    tree, names, wrong = ast.parse(source), dict[str, Any](), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                names[alias.asname or alias.name.partition(".")[0]] = (
                    module if alias.asname else importlib.import_module(alias.name.split(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    wrong.append(f"{node.module} has no {alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name, None)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            called, known = _found(name, names)
            if known and called is None:
                wrong.append(f"{name} does not exist")
            elif callable(called):
                wrong += [f"{name} takes no {key}" for key in _unknown(called, node)]
    return wrong


def _found(name: str, names: dict[str, Any]) -> tuple[Any, bool]:
    """What a dotted name stands for, and whether its first part was imported."""
    first, *rest = name.split(".")
    if first not in names:
        return None, False
    value = names[first]
    for part in rest:
        value = getattr(value, part, None)
    return value, True


def _unknown(called: Callable[..., Any], call: ast.Call) -> list[str]:
    """The keywords of a call that the function does not take."""
    parameters = inspect.signature(called).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    return [word.arg for word in call.keywords if word.arg and word.arg not in parameters]
