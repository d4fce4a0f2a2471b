"""The families' tests, slow ones too, on several versions of transformers, as the table in
docs/versions.md.

    python -m tests.matrix 5.4.0 5.13.1 5.23.0

Each version gets a virtual environment of its own under .matrix, with transformers and what that
version asks for; everything else is seen through from the environment that runs this. The results
(JUnit XML, kept beside) become the table between the markers of docs/versions.md. Exit status 1:
tests failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"
PAGE = ROOT / "docs" / "versions.md"
START, STOP = "<!-- matrix: make test-matrix writes this -->", "<!-- end of matrix -->"


@dataclass
class Cell:
    """The tests of one family on one version."""

    counts: Counter[str] = field(default_factory=Counter)
    models: set[str] = field(default_factory=set)


@dataclass
class Results:
    """One version's results: family -> its tests; why tests were skipped."""

    cells: dict[str, Cell] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def prepare(version: str) -> Path:
    """An environment with this version of transformers; returns its interpreter."""
    environment = FOLDER / version
    python = python_of(environment)
    done = environment / ".installed"
    if done.exists():
        return python
    venv.create(environment, with_pip=True, clear=True)
    own, *_ = ask(python, "import site; print(site.getsitepackages()[0])")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in seen]
    (Path(own) / "outside.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run(
        [*pip, "--ignore-installed", "--no-deps", f"transformers=={version}"], check=True
    )
    subprocess.run([*pip, f"transformers=={version}"], check=True)
    done.touch()
    return python


def ask(python: Path, code: str) -> list[str]:
    """What a piece of Python prints, line by line."""
    answer = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return answer.stdout.splitlines()


def run(version: str) -> Path:
    """The families' tests on one version; returns their JUnit XML."""
    python = prepare(version)
    found = ask(python, "import transformers; print(transformers.__version__)")
    if found != [version]:
        raise SystemExit(f"{python} runs transformers {found[0]}, not {version}: remove {FOLDER}.")
    xml = FOLDER / f"{version}.xml"
    xml.unlink(missing_ok=True)
    options = ["-q", "-n", "auto", "-m", "slow or not slow", f"--junitxml={xml}"]
    options += ["-o", "junit_family=xunit1"]
    subprocess.run([python, "-m", "pytest", "tests/families", *options], cwd=ROOT)
    if not xml.exists():
        raise SystemExit(f"the tests on transformers {version} wrote no results.")
    return xml


def read(xml: Path) -> Results:
    """Results by family; tests of no family count as "package"."""
    results = Results()
    for case in ElementTree.parse(xml).iter("testcase"):
        named = {entry.get("name"): entry.get("value", "") for entry in case.iter("property")}
        skipped = case.find("skipped")
        wrong = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if wrong else "passed" if skipped is None else "skipped"
        cell = results.cells.setdefault(named.get("family", "package"), Cell())
        cell.counts[outcome] += 1
        if "model" in named:
            cell.models.add(named["model"])
        if skipped is not None:
            # What follows a colon is one test's own message.
            results.reasons.add(skipped.get("message", "").split(": ")[0])
    return results


def words(cell: Cell | None, expected: set[str]) -> str:
    """What the table says of one family on one version."""
    if cell is None:
        return "not in it"
    passed, failed, skipped = (cell.counts[name] for name in ("passed", "failed", "skipped"))
    text = f"{failed} of {passed + failed} fail" if failed else f"{passed} pass"
    if skipped:
        text += f", {skipped} skipped"
    absent = sorted(expected - cell.models)
    return text + (f"; no {', '.join(f'`{name}`' for name in absent)}" if absent else "")


def table(results: dict[str, Results], order: Iterable[str]) -> str:
    """The table of families by versions, and why tests were skipped.

    Args:
        order: families in the order of the rows.
    """
    versions = list(results)
    rows = ["| family | " + " | ".join(versions) + " |", "|---" * (len(versions) + 1) + "|"]
    for family in order:
        cells = [results[version].cells.get(family) for version in versions]
        expected: set[str] = set().union(*(cell.models for cell in cells if cell is not None))
        said = (words(cell, expected) for cell in cells)
        rows.append(f"| `{family}` | " + " | ".join(said) + " |")
    reasons: dict[str, list[str]] = {}
    for version in versions:
        for reason in results[version].reasons:
            reasons.setdefault(reason, []).append(version)
    notes = [f"- Skipped on {', '.join(reasons[reason])}: {reason}" for reason in sorted(reasons)]
    return "\n".join([*rows, "", *notes]).rstrip()


def between(page: Path, start: str, stop: str, text: str) -> None:
    """Put a text between two markers of a page."""
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(stop), re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise SystemExit(f"{page} has not got the markers {start} and {stop} once.")
    new = pattern.sub(lambda _: f"{start}\n{text}\n{stop}", old)
    page.write_text(new, encoding="utf-8")


def write(readme: Path, text: str) -> None:
    """Put the table between the markers."""
    between(readme, START, STOP, text)


def main() -> int:
    """Run the versions asked for, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("versions", nargs="+", help="of transformers")
    parser.add_argument("--read-only", action="store_true", help="write the table of kept results")
    given = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    results = {}
    for version in given.versions:
        kept = FOLDER / f"{version}.xml"
        results[version] = read(kept if given.read_only else run(version))
    from atp_patch.families import FAMILIES

    torch, *_ = ask(Path(sys.executable), "import torch; print(torch.__version__.split('+')[0])")
    used = f"Python {python_version()}, torch {torch}"
    about = f"Tests of each family, by version of transformers ({used}):"
    write(PAGE, f"{about}\n\n{table(results, [f.name for f in FAMILIES])}")
    failed = sum(cell.counts["failed"] for one in results.values() for cell in one.cells.values())
    return int(failed > 0)


def python_version() -> str:
    """As 3.11."""
    return ".".join(platform.python_version_tuple()[:2])


if __name__ == "__main__":
    raise SystemExit(main())
