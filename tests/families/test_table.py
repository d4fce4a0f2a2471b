"""The tables of docs/families.md are what the families' data say."""

from __future__ import annotations

import pytest

from atp_patch.families import FAMILIES
from atp_patch.families.base import scaled_layers
from tests import family_table
from tests.families.hosts import HOST, NEWEST
from tests.families.tables import NOT_BUILT


@pytest.mark.skipif(HOST < NEWEST, reason="the page has the families of newer versions too")
def test_the_page_holds_the_tables() -> None:
    page = family_table.PAGE.read_text(encoding="utf-8")
    assert family_table.written(page) == page, "run python -m tests.family_table"


def test_every_row_is_built() -> None:
    if NOT_BUILT and HOST < NEWEST:
        pytest.skip(f"this version refuses its own configs of {', '.join(NOT_BUILT)}")
    assert not NOT_BUILT


def test_every_family_says_how_its_tokens_lie() -> None:
    assert all(family.layout for family in FAMILIES)


def test_default_layers_of_checkpoints() -> None:
    """The table of checkpoints is written by hand; its last column follows from the depth."""
    page = family_table.PAGE.read_text(encoding="utf-8")
    rows = page.partition("| family | checkpoint |")[2].partition("\n\n")[0].splitlines()[2:]
    named = {family.name: family for family in FAMILIES}
    assert len(rows) >= 40
    for row in rows:
        family, _, depth, _, layers = (cell.strip(" `") for cell in row.strip("|").split("|"))
        # Elsewhere pruning stands behind layers that attend, or before keys that are reused.
        if not named[family].keeps_state and family not in ("gemma3n", "gemma4"):
            assert layers == str(scaled_layers(int(depth)))
