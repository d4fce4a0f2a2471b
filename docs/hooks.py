"""What mkdocs needs to make a site of pages that are also read on a forge.

- Pages link to files outside of ``docs`` (results, examples, the changelog). These files come into
  the site, and links among all of them are rewritten to where they lie there.
- Figures have a version for light and one for dark pages. On a forge the HTML element `picture`
  names both. The site has a switch of its own, for which the theme names both in its own way.
- Docstrings hold references such as :func:`patch_model`. They become code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = Path(__file__).resolve().parent
HOME = DOCS / "README.md"
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img src="(?P<light>[^"]+)" alt="(?P<alt>[^"]+)">\s*</picture>'
)
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def _linked(page: Path) -> set[Path]:
    """The files of this repository that a page links to or shows."""
    text = _as_markdown(page.read_text(encoding="utf-8"))
    targets = (found[1] for found in LINK.findall(text))
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def _as_markdown(text: str) -> str:
    """Write figures with two versions as two pictures, of which the theme shows one."""
    both = r"![\g<alt>](\g<light>#only-light) ![\g<alt>](\g<dark>#only-dark)"
    return PICTURE.sub(both, text)


def _place(file: Path) -> str:
    """Where a file of the repository lies among the sources of the site."""
    if file == ROOT / "README.md":
        file = HOME  # the site has a first page of its own
    return file.relative_to(DOCS if file.is_relative_to(DOCS) else ROOT).as_posix()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside of ``docs``, and what those files link to in turn."""
    waiting = {Path(file.abs_src_path or "") for file in files.documentation_pages()}
    known = {Path(file.abs_src_path or "") for file in files} | {ROOT / "README.md"}
    while waiting:
        for file in _linked(waiting.pop()) - known:
            if not file.is_file() or not file.is_relative_to(ROOT):
                continue  # mkdocs itself warns of a link that leads nowhere
            known.add(file)
            files.append(File.generated(config, _place(file), abs_src_path=str(file)))
            if file.suffix == ".md":
                waiting.add(file)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite links between files of the repository to links between files of the site."""
    source = Path(page.file.abs_src_path or "")
    here = Path(page.file.src_uri).parent

    def rewritten(found: re.Match[str]) -> str:
        if "://" in found[2]:
            return found[0]
        target = (source.parent / found[2]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return found[0]
        return found[1] + os.path.relpath(_place(target), here) + found[3]

    return LINK.sub(rewritten, _as_markdown(markdown))


class PlainReferences(griffe.Extension):
    """Write references in docstrings, such as :func:`patch_model`, as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
