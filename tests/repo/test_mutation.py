"""The program of mutation testing: what it changes, which tests it runs, what it calls killed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutation

SOURCE = '''"""Said."""

LIMIT = 3


def capped(x: int = 1, *, low: int = 0) -> int:
    """Said."""
    if not x > low:
        raise ValueError(f"{x + 1} is not above {low}")
    return min(x + 1, LIMIT)


def unseen(flag: bool) -> int | None:
    return capped(2, low=1) if flag else None
'''
TESTS = """
import pytest
from toy.source import capped


def test_capped():
    assert capped(1) == 2
    assert capped(7) == 3
    with pytest.raises(ValueError):
        capped(0)


def test_low():
    assert capped(2, low=1) == 3
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A package of one file, and its tests."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "source.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "test_toy.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\npythonpath = ['.']\n", encoding="utf-8"
    )
    return tmp_path


def made(source: str) -> list[str]:
    """What a line of source is changed to."""
    found = []
    for index, _ in enumerate(mutation.changes(ast.parse(source))):
        tree = ast.parse(source)
        list(mutation.changes(tree))[index].make()
        found.append(ast.unparse(tree))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("a is not b", ["a is b"]),
        ("a + b", ["a - b"]),
        ("a += b", ["a -= b"]),
        ("a and b", ["a or b"]),
        ("not a", ["a"]),
        ("~a", ["a"]),
        ("-a", ["a"]),
        ("a = 2", ["a = 3"]),
        ("a = True", ["a = False"]),
        ("a = None", []),
        ("a = 'text'", []),
        ("f(x, dim=d)", ["f(x)"]),
        ("f(x, device=d)", []),
        ("x.amax(d)", ["x.amin(d)"]),
        ("any(x)", ["all(x)"]),
        ("a if b else c", ["a if not b else c"]),
        ("raise E(1)", []),
        ("x: Literal[1] = y", []),
        ("@f(1)\ndef g(a=b) -> 1:\n    return a", ["@f(1)\ndef g(a=b) -> 1:\n    return None"]),
        ("def f():\n    return", []),
        ("if a:\n    b", ["if not a:\n    b"]),
    ],
)
def test_what_is_changed(source: str, expected: list[str]) -> None:
    assert made(source) == expected


def test_every_mutant_of_the_package_is_another_source() -> None:
    """And each can be compiled; one file here, of those with the most."""
    path = Path("atp_patch/maths/merging.py")
    for mutant in mutation.mutants_of(path):
        assert mutation.compiled(mutant).co_filename == str(path)
        before, after = mutant.change.split(" -> ", 1)
        assert before != after


def run(toy: Path, *options: str) -> tuple[int, str]:
    """The program on the toy package."""
    done = subprocess.run(
        [sys.executable, mutation.__file__, "--sources", "toy", "--tests", "test_toy.py", *options],
        cwd=toy,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_program_tells_killed_from_survivors(toy: Path) -> None:
    status, told = run(toy)
    assert status == 0, told
    survived = set(re.findall(r"survived .*source\.py:\d+: (.+?)  \[", told))
    # The default of x is given in every test, and nothing calls ``unseen``.
    assert survived == {
        "1 -> 2",
        "2 -> 3",
        "return capped(2, low=1) if flag else None -> return None",
        "capped(2, low=1) if flag else None -> capped(2, low=1) if not flag else None",
        "capped(2, low=1) -> capped(2)",
    }
    killed = re.findall(r"failed .*source\.py:\d+: (.+?)  \[(.+)\]", told)
    assert ("3 -> 4", "test_toy.py::test_capped") in killed
    assert ("x > low -> x >= low", "test_toy.py::test_capped") in killed
    row = re.search(r"\| all \| (\d+) \| (\d+) \| (\d+) \| (.+)% \|", told)
    assert row is not None
    every, dead, alive = (int(n) for n in row.groups()[:3])
    assert every == dead + alive
    assert float(row[4]) == pytest.approx(100 * dead / every, abs=0.05)
    assert (toy / "toy" / "source.py").read_text(encoding="utf-8") == SOURCE


def test_a_sample_is_drawn_by_its_seed() -> None:
    mutants = mutation.mutants_of(Path("atp_patch/maths/indexing.py"))
    first, again, other = (mutation.draw(mutants, 9, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) == 9
    assert [mutant.index for mutant in first] == sorted(mutant.index for mutant in first)
    assert mutation.draw(mutants, len(mutants), 0) == mutation.draw(mutants, None, 0) == mutants


def test_tests_that_fail_on_the_source_are_refused(toy: Path) -> None:
    with (toy / "test_toy.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef test_wrong():\n    assert capped(1) == 5\n")
    status, told = run(toy)
    assert status != 0
    assert "the tests do not pass on the source as it is" in told


@pytest.mark.slow
def test_a_mutant_that_does_not_end_is_ended(toy: Path) -> None:
    source = "def count():\n    n = 3\n    while n > 0:\n        n -= 1\n    return n\n"
    (toy / "toy" / "source.py").write_text(source, encoding="utf-8")
    test = "from toy.source import count\n\n\ndef test_count():\n    assert count() == 0\n"
    (toy / "test_toy.py").write_text(test, encoding="utf-8")
    _, told = run(toy, "--limit", "2")
    assert re.search(r"time .*n -= 1 -> n \+= 1", told)
