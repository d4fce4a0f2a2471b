"""Mutation testing: how many small faults, put into the source one at a time, do the tests find?

    python -m tests.mutation --sources atp_patch/maths --tests tests/maths --sample 400 --seed 0

A mutant is the source with one change: a comparison, an arithmetic operator, a reduction or a
rounding replaced by its opposite, a number changed by one, a truth value or a condition turned
round, a keyword argument left out, a value not returned. Annotations, decorators, error messages
and ``device=`` are left alone: on CPUs no test could tell the last one.

Each mutant runs in a forked process of its own, in which torch, transformers and whatever else the
tests import are loaded already, and the package is not: it is imported there from the changed
source, so that classes, constants and default values are mutated as well as the bodies of
functions. Of the tests, those run that come by the changed line (all of them where the line runs
at import), and the first that fails ends the process. Nothing is written to the source.

A mutant is killed when a test fails, when the package cannot be imported any more, or when the
tests take longer than the limit. One that no test comes by survives. Needs
``os.fork``, so it runs on Linux and macOS.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from hypothesis import settings

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_OPPOSITES = (
    ("amax", "amin"),
    ("max", "min"),
    ("argmax", "argmin"),
    ("any", "all"),
    ("sum", "mean"),
    ("floor", "ceil"),
    ("cumsum", "cumprod"),
    ("log", "exp"),
)
NAMES = {a: b for one, other in _OPPOSITES for a, b in ((one, other), (other, one))}
KEYWORDS_LEFT_ALONE = {"device"}
KILLED = ("failed", "import", "time")


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: the file, relative to the working directory.
        index: the number of the change among all changes of the file.
        line: where it is.
        lines: the first and last line of those that run where it matters.
        change: what it is, as ``before -> after``.
    """

    path: Path
    index: int
    line: int
    lines: tuple[int, int]
    change: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.change}"


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of one node: each time a copy of it with one change."""

    def changed(**fields: Any) -> ast.AST:
        twin = copy.copy(node)
        for name, value in fields.items():
            setattr(twin, name, value)
        return twin

    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                if type(op) in OPERATORS:
                    yield changed(ops=[*ops[:i], OPERATORS[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            if type(op) in OPERATORS:
                yield changed(op=OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield changed(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield changed(value=value + 1)
        case ast.Return(value=ast.expr()) if not is_none(node.value):
            yield changed(value=ast.Constant(None))
        case ast.If(test=ast.Name() | ast.Attribute() | ast.Call()):
            yield changed(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.IfExp(test=ast.Name() | ast.Attribute() | ast.Call()):
            yield changed(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Call(func=function, keywords=keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg is not None and keyword.arg not in KEYWORDS_LEFT_ALONE:
                    yield changed(keywords=[*keywords[:i], *keywords[i + 1 :]])
            if isinstance(function, ast.Attribute) and function.attr in NAMES:
                yield changed(func=ast.Attribute(function.value, NAMES[function.attr], ast.Load()))
            elif isinstance(function, ast.Name) and function.id in NAMES:
                yield changed(func=ast.Name(NAMES[function.id], ast.Load()))


def is_none(node: ast.AST | None) -> bool:
    """Whether a node is the literal None."""
    return isinstance(node, ast.Constant) and node.value is None


@dataclass(frozen=True)
class Change:
    """One change of a syntax tree.

    Attributes:
        parent: the node that holds what is replaced.
        field: under which name.
        place: at which place, where the field is a list.
        new: what is to stand there.
        lines: the first and last line of those that run where it matters.
    """

    parent: ast.AST
    field: str
    place: int | None
    new: ast.AST
    lines: tuple[int, int]

    @property
    def old(self) -> Any:
        """What stands there."""
        value: Any = getattr(self.parent, self.field)
        return value if self.place is None else value[self.place]

    def make(self) -> None:
        """Change the tree."""
        ast.copy_location(self.new, self.old)
        if self.place is None:
            setattr(self.parent, self.field, self.new)
        else:
            getattr(self.parent, self.field)[self.place] = self.new
        ast.fix_missing_locations(self.new)


def changes(tree: ast.Module) -> Iterator[Change]:
    """Every change that may be made to a file, in a fixed order."""

    def walk(node: ast.AST, lines: tuple[int, int]) -> Iterator[Change]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                    continue
                around = lines_of(child) if isinstance(child, ast.stmt) else lines
                for new in replacements(child):
                    place = i if isinstance(value, list) else None
                    yield Change(node, field, place, new, around)
                yield from walk(child, around)

    yield from walk(tree, (1, 1))


def lines_of(statement: ast.stmt) -> tuple[int, int]:
    """The lines that run where a statement matters: its own, and of a block those of its head.

    The head of a function runs at import, but what it says matters where the body runs.
    """
    body = getattr(statement, "body", None)
    end = statement.end_lineno or statement.lineno
    if isinstance(statement, ast.FunctionDef):
        return statement.body[0].lineno, end
    if isinstance(body, list):
        return statement.lineno, max(statement.lineno, body[0].lineno - 1)
    return statement.lineno, end


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a file."""
    found = []
    for index, change in enumerate(changes(parsed(path))):
        told = f"{_head(change.old)} -> {_head(change.new)}"
        found.append(Mutant(path, index, change.old.lineno, change.lines, told))
    return found


def _head(node: ast.AST) -> str:
    """The first line of a node's source."""
    return ast.unparse(node).splitlines()[0]


def compiled(mutant: Mutant) -> CodeType:
    """The code of the changed file."""
    tree = parsed(mutant.path)
    for index, change in enumerate(changes(tree)):
        if index == mutant.index:
            change.make()
            return compile(tree, str(mutant.path), "exec")
    raise IndexError(f"{mutant.path} has no change number {mutant.index}")


class Loader(SourceFileLoader):
    """Loads one module from code that is given."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        super().__init__(name, str(path.resolve()))
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        """The given code, whatever the file holds."""
        return self._code


class Finder(MetaPathFinder):
    """Finds the mutated module before anything else does."""

    def __init__(self, mutant: Mutant) -> None:
        parts = mutant.path.with_suffix("").parts
        self._package = parts[-1] == "__init__"
        self._name = ".".join(parts[:-1] if self._package else parts)
        self._path = mutant.path
        self._code = compiled(mutant)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's specification, for this one name."""
        if fullname != self._name:
            return None
        loader = Loader(fullname, self._path, self._code)
        inside = [str(self._path.resolve().parent)] if self._package else None
        return spec_from_file_location(
            fullname, self._path, loader=loader, submodule_search_locations=inside
        )


class Picker:
    """A pytest plugin: runs the wanted tests alone, in the wanted order, and tells which failed."""

    def __init__(self, note: Path, wanted: Sequence[str]) -> None:
        self._note = note
        self._places = {test: place for place, test in enumerate(wanted)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Called when all tests of the files are known."""
        items[:] = [item for item in items if item.nodeid in self._places]
        items.sort(key=lambda item: self._places[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called after each phase of each test."""
        if report.failed and not self._note.exists():
            self._note.write_text(report.nodeid, encoding="utf-8")


class Tracer:
    """A pytest plugin: notes by which lines of the sources each test comes, and what is imported.

    ``lines`` of the note: path -> line -> the tests. What runs before the first test is under the
    name of no test.
    """

    def __init__(self, note: Path, sources: Sequence[Path]) -> None:
        self._note = note
        self._paths = {str(path.resolve()): str(path) for path in sources}
        self._seen: set[tuple[str, int]] = set()
        self._lines: dict[str, dict[int, list[str]]] = {str(path): {} for path in sources}

    def start(self) -> None:
        """Begin, before anything of the package is imported."""
        sys.settrace(self._call)
        threading.settrace(self._call)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._paths else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def _take(self, test: str) -> None:
        for file, line in self._seen:
            self._lines[self._paths[file]].setdefault(line, []).append(test)
        self._seen.clear()

    def pytest_collection_finish(self) -> None:
        """Called when all tests have been imported."""
        self._take("")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Called after each test."""
        self._take(nodeid)

    def pytest_sessionfinish(self) -> None:
        """Called at the end."""
        told = {"modules": list(sys.modules), "lines": self._lines}
        self._note.write_text(json.dumps(told), encoding="utf-8")


def in_fork(work: Callable[[Path], int], limit_s: float) -> tuple[int | None, str]:
    """Do some work in a forked process, given a folder of its own.

    Returns:
        Its exit status, None where it had to be ended, and what it left in the file ``note``.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                code = work(folder)
            finally:
                os._exit(code)
        status = _wait(child, limit_s)
        note = folder / "note"
        return status, note.read_text(encoding="utf-8") if note.exists() else ""


def _wait(child: int, limit_s: float) -> int | None:
    """The exit status of a child, or None where it had to be ended."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_tests(tests: Sequence[str], folder: Path, plugin: object) -> int:
    """Run tests in this process until the first failure; returns pytest's exit status."""
    # Examples are drawn the same way every time, and a busy machine makes no test fail.
    settings.register_profile("mutation", database=None, derandomize=True, deadline=None)
    settings.load_profile("mutation")
    without = [f"-pno:{name}" for name in ("cacheprovider", "xdist")]
    options = ["-x", "-q", "--no-header", "-otimeout=0", f"--basetemp={folder / 'tmp'}"]
    return int(pytest.main([*options, *without, *tests], plugins=[plugin]))


def trace(sources: Sequence[Path], tests: Sequence[str]) -> dict[str, Any]:
    """What :class:`Tracer` notes of the tests on the source as it is; they must pass.

    Args:
        tests: files, folders, and pytest's options of choosing among them.
    """

    def work(folder: Path) -> int:
        tracer = Tracer(folder / "note", sources)
        tracer.start()
        return run_tests(tests, folder, tracer)

    status, note = in_fork(work, 3600)
    if status != 0:
        raise SystemExit("the tests do not pass on the source as it is")
    told: dict[str, Any] = json.loads(note)
    return told


def judge(mutant: Mutant, tests: Sequence[str], limit_s: float) -> tuple[str, str]:
    """Run these tests on a mutant.

    Returns:
        What became of it ("survived", "failed", "import", "time"), and the test that failed.
    """

    def work(folder: Path) -> int:
        sys.meta_path.insert(0, Finder(mutant))
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        return run_tests(files, folder, Picker(folder / "note", tests))

    status, failed = in_fork(work, limit_s)
    if status is None:
        return "time", failed
    if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return "survived", failed
    return "failed" if failed else "import", failed


def preload(names: Sequence[str]) -> None:
    """Import what the tests import, but for the package and the tests themselves."""
    ours = ("atp_patch", "tests", "conftest", "__main__", "_pytest", "pytest_", "xdist")
    for name in names:
        if name.startswith(ours) or name in sys.modules:
            continue
        try:
            importlib.import_module(name)
        except Exception:  # a test's own module, or one that only an entry point can load
            continue


def sources_of(paths: Sequence[str]) -> list[Path]:
    """The files among these files and folders."""
    found = [Path(path) for path in paths]
    return sorted(
        {file for path in found for file in (path.rglob("*.py") if path.is_dir() else [path])}
    )


def draw(mutants: Sequence[Mutant], sample: int | None, seed: int) -> list[Mutant]:
    """``sample`` of the mutants, or all where there are no more, in the order of the files."""
    if sample is None or sample >= len(mutants):
        return list(mutants)
    drawn = random.Random(seed).sample(mutants, sample)
    return sorted(drawn, key=lambda mutant: (mutant.path, mutant.index))


class Chooser:
    """Which tests to run on a mutant, and in which order."""

    def __init__(self, lines: dict[str, dict[str, list[str]]], everything: Sequence[str]) -> None:
        self._lines = lines
        self._all = everything
        self._kills: Counter[tuple[Path, str]] = Counter()

    def of(self, mutant: Mutant) -> list[str]:
        """Those that come by its lines: first what killed another mutant of its file."""
        first, last = mutant.lines
        by_line = self._lines[str(mutant.path)]
        tests = {test for n in range(first, last + 1) for test in by_line.get(str(n), ())}
        if "" in tests:
            tests = set(self._all)

        def likeliest(test: str) -> tuple[int, bool, str]:
            return -self._kills[mutant.path, test], mutant.path.stem not in test, test

        return sorted(tests, key=likeliest)

    def note(self, mutant: Mutant, killer: str) -> None:
        """This test killed it."""
        self._kills[mutant.path, killer] += 1


def main() -> int:
    """Mutate, run, and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sources", nargs="+", required=True, help="files and folders to mutate")
    parser.add_argument("--tests", nargs="+", required=True, help="files and folders of tests")
    parser.add_argument("--keyword", default="", help="choose among them, as pytest's -k does")
    parser.add_argument("--sample", type=int, help="mutants to draw; all where left out")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each mutant")
    given = parser.parse_args()

    sources = sources_of(given.sources)
    told = trace(sources, [*given.tests, "-k", given.keyword])
    preload(told["modules"])
    tests = {test for by_line in told["lines"].values() for at in by_line.values() for test in at}
    chooser = Chooser(told["lines"], sorted(tests - {""}))

    everything = [mutant for path in sources for mutant in mutants_of(path)]
    drawn = draw(everything, given.sample, given.seed)
    write(f"{len(drawn)} of {len(everything)} mutants, seed {given.seed}")
    outcomes: dict[Path, Counter[str]] = {}
    for number, mutant in enumerate(drawn, 1):
        start = time.monotonic()
        chosen = chooser.of(mutant)
        outcome, killer = judge(mutant, chosen, given.limit) if chosen else ("survived", "")
        outcomes.setdefault(mutant.path, Counter())[outcome] += 1
        if outcome == "failed":
            chooser.note(mutant, killer)
        taken_s = time.monotonic() - start
        about = killer or f"{len(chosen)} tests"
        write(f"{number:4d} {outcome:8s} {taken_s:5.1f} s  {mutant}  [{about}]")
    write(summary(outcomes))
    return 0


def write(line: str) -> None:
    """A line of the log, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def summary(outcomes: dict[Path, Counter[str]]) -> str:
    """The table of files, in Markdown."""
    rows = ["| file | mutants | killed | survived | share killed |", "|---|---|---|---|---|"]
    total: Counter[str] = Counter()
    for path, counts in outcomes.items():
        rows.append(_row(f"`{path}`", counts))
        total += counts
    return "\n".join([*rows, _row("all", total)])


def _row(name: str, counts: Counter[str]) -> str:
    killed, every = sum(counts[how] for how in KILLED), sum(counts.values())
    return f"| {name} | {every} | {killed} | {counts['survived']} | {killed / every:.1%} |"


if __name__ == "__main__":
    raise SystemExit(main())
