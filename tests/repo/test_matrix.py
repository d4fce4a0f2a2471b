"""The program that turns test results into the table of docs/versions.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from atp_patch.families import FAMILIES
from tests import matrix

CASE = '<testcase name="t"><properties>{}</properties>{}</testcase>'
NAMED = '<property name="family" value="{}"/><property name="model" value="{}"/>'


def results(folder: Path, *cases: tuple[str, str, str]) -> matrix.Results:
    """Results of cases (family, model, what the XML says of it)."""
    body = "".join(
        CASE.format(NAMED.format(family, model), inside) for family, model, inside in cases
    )
    xml = folder / "results.xml"
    xml.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>", encoding="utf-8")
    return matrix.read(xml)


def test_what_passed_failed_and_is_not_there_is_told_apart(tmp_path: Path) -> None:
    old = results(
        tmp_path,
        ("llava", "llava", ""),
        ("llava", "llava", '<failure message="no"/>'),
        ("glm4v", "glm4v", ""),
        ("glm4v", "glm4v", '<skipped message="why not"/>'),
    )
    new = results(
        tmp_path,
        ("llava", "llava", ""),
        ("glm4v", "glm4v", ""),
        ("glm4v", "glm46v", ""),
        ("molmo2", "molmo2", '<skipped message="why not"/>'),
        ("molmo2", "molmo2", '<skipped message="another reason: details"/>'),
    )
    text = matrix.table({"1.0": old, "2.0": new}, ["llava", "glm4v", "molmo2"])
    assert text.splitlines() == [
        "| family | 1.0 | 2.0 |",
        "|---|---|---|",
        "| `llava` | 1 of 2 fail | 1 pass |",
        "| `glm4v` | 1 pass, 1 skipped; no `glm46v` | 2 pass |",
        "| `molmo2` | not in it | 0 pass, 2 skipped |",
        "",
        "- Skipped on 2.0: another reason",
        "- Skipped on 1.0, 2.0: why not",
    ]


def test_the_table_goes_between_the_markers_and_nowhere_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{matrix.START}\nold\n{matrix.STOP}\nb\n", encoding="utf-8")
    for text in ("first \\1", "second"):
        matrix.write(readme, text)
        assert readme.read_text() == f"a\n{matrix.START}\n{text}\n{matrix.STOP}\nb\n"
    readme.write_text("a\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="markers"):
        matrix.write(readme, "third")


def test_the_table_has_every_family_and_no_failure() -> None:
    text = matrix.PAGE.read_text(encoding="utf-8").split(matrix.START)[1].split(matrix.STOP)[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    assert [family for family, _ in rows] == [family.name for family in FAMILIES]
    assert all("fail" not in cells for _, cells in rows)
    pinned = re.search(
        r"^transformers==([\d.]+)", (matrix.ROOT / "constraints.txt").read_text(), re.M
    )
    assert pinned is not None
    assert f" {pinned[1]} |" in text, "run `make test-matrix` for the pinned version"
