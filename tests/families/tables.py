"""The families' rows, and the parametrization by which a test runs for each of them.

Rows of ``ORDINARY`` run in every test. Rows of ``LATER`` run in :mod:`tests.families.test_core`,
which holds each of them to the core of the same promises, and in every other test when slow tests
are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.families import (
    anyres,
    fuyu,
    gemma4,
    hybrids,
    latents,
    llama4,
    molmo2,
    more_mrope,
    more_square,
    mrope,
    newer,
    omni,
    sized,
    square,
    towers,
)
from tests.families.kinds import Kind

_ORDINARY = (square, anyres, towers, mrope, newer, molmo2)
ORDINARY: tuple[Kind, ...] = tuple(kind for table in _ORDINARY for kind in table.KINDS)
LATER: tuple[Kind, ...] = tuple(
    kind
    for table in (
        more_square,
        more_mrope,
        sized,
        latents,
        fuyu,
        gemma4,
        hybrids,
        llama4,
        omni,
    )
    for kind in table.KINDS
)


def rows(ordinary: Iterable[Kind], later: Iterable[Kind]) -> Any:
    """A parametrization by ``kind``; the later rows are marked slow."""
    slow = [pytest.param(kind, marks=pytest.mark.slow) for kind in later]
    return pytest.mark.parametrize("kind", [*ordinary, *slow], ids=lambda kind: kind.name)


every_kind = rows(ORDINARY, LATER)
_FIRST = tuple(kind for table in _ORDINARY for kind in table.KINDS[:1])
one_of_each_table = rows(_FIRST, (kind for kind in (*ORDINARY, *LATER) if kind not in _FIRST))
with_videos = rows(
    (kind for kind in ORDINARY if kind.videos), (kind for kind in LATER if kind.videos)
)
_LATER_ROTARY = (*more_mrope.KINDS, *hybrids.ROTARY_PLACES)
with_rotary_places = rows(mrope.KINDS, _LATER_ROTARY)
ROTARY_PLACES = (*mrope.KINDS, *_LATER_ROTARY)
