"""Pages and what they link to: nothing is missing, nothing is kept that no page shows, and the
README is short and says what the pages say.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


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
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r' src(?:set)?="(.+?)"', text)
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as a forge and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    words = (
        re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.M)
    )
    return {word.strip().replace(" ", "-") for word in words}


def test_every_link_leads_somewhere() -> None:
    pages = tracked("*.md")
    assert README in pages
    missing = {(page, file) for page in pages for file in linked(page) if not file.exists()}
    assert not missing


def test_every_anchor_is_a_heading() -> None:
    for page in tracked("*.md"):
        for target, anchor in re.findall(
            r"\]\(([^)#\s]*\.md)?#([^)\s]+)\)", page.read_text(encoding="utf-8")
        ):
            there = (page.parent / target).resolve() if target else page
            assert anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def test_every_figure_is_shown() -> None:
    figures = tracked("results/*.png") | tracked("docs/*.png")
    assert figures
    assert figures <= {file for page in tracked("*.md") for file in linked(page)}


def test_every_drawn_figure_has_a_version_for_dark_pages() -> None:
    """A screenshot of the web page is as it is; every other picture is shown in two versions."""
    figure = re.compile(
        r'^<picture>\n  <source media="\(prefers-color-scheme: dark\)" srcset="(.+)-dark\.png">\n'
        r'  <img src="(.+)\.png" alt="([^"\]]+)">\n</picture>$',
        re.MULTILINE,
    )
    shown = set()
    for page in tracked("docs/*.md"):
        text = page.read_text(encoding="utf-8")
        versions = figure.findall(text)
        assert len(versions) == text.count("<picture>") == text.count("<img"), page
        assert all(dark == light for dark, light, _ in versions), page
        shown |= {Path(light).name for _, light, _ in versions}
        alone = {Path(name).name for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
        assert alone <= {"web_kept.png", "web_compare.png"}, page
    names = {path.stem for path in tracked("docs/pictures/*.png")}
    assert names == shown | {f"{name}-dark" for name in shown}


def test_the_site_has_every_page() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        assert isinstance(parts, (list, type({}.values())))
        return [file for part in parts for file in files(part)]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {page.name for page in tracked("docs/*.md")}
    assert sorted(files(settings["nav"])) == sorted(
        pages | {"CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}
    )


def test_the_first_page_links_every_page() -> None:
    pages = {page for page in tracked("docs/*.md") if page.name != "README.md"}
    assert pages <= linked(ROOT / "docs" / "README.md")


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    section = README.read_text(encoding="utf-8").split("\n## Results\n")[1].split("\n## ")[0]
    figures = re.findall(r"\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]", section)
    assert len(figures) >= 15
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(figure in results for figure in figures)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "target_tokens" in reference
    assert ":func:" not in reference
    assert (tmp_path / "results" / "builtin" / "table" / "index.html").is_file()
    explained = (tmp_path / "how-it-works" / "index.html").read_text(encoding="utf-8")
    for picture, theme in (("stairs.png", "light"), ("stairs-dark.png", "dark")):
        assert f'src="../pictures/{picture}#only-{theme}"' in explained
        assert (tmp_path / "pictures" / picture).is_file()
