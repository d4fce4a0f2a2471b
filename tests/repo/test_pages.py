"""Pages and what they link to: nothing is missing, and no figure is kept that no page shows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(pattern: str) -> set[Path]:
    """Files under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout of the repository")
    return {ROOT / name for name in listed.stdout.split("\0") if name}


def linked(page: Path) -> set[Path]:
    """Files of ours that a page shows or links to."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def test_every_link_leads_somewhere() -> None:
    pages = tracked("*.md")
    assert ROOT / "README.md" in pages
    missing = {(page, file) for page in pages for file in linked(page) if not file.exists()}
    assert not missing


def test_every_figure_is_shown() -> None:
    figures = tracked("results/*.png")
    assert figures
    assert figures <= {file for page in tracked("*.md") for file in linked(page)}
