"""The families' rows, and the parametrizations by which a test runs for each of them.

Rows of ``IN_FULL`` run in every test. Rows of ``IN_BRIEF`` run in :mod:`tests.families.test_core`,
which holds each of them to the core of the same promises, and in every other test when slow tests
are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.families import (
    anyres,
    fuyu,
    gemma3n,
    gemma4,
    granite4,
    hybrids,
    latents,
    llama4,
    molmo2,
    more_mrope,
    more_square,
    mrope,
    newer,
    omni,
    phi4,
    sized,
    square,
    towers,
)
from tests.families.hosts import can_be_built
from tests.families.kinds import Kind

_TABLES = (square, anyres, towers, mrope, newer, molmo2)
_BRIEF_TABLES = (
    more_square,
    more_mrope,
    sized,
    latents,
    fuyu,
    gemma3n,
    gemma4,
    granite4,
    hybrids,
    llama4,
    omni,
    phi4,
)
# Rows of the first tables that go the ways of another row of their table, with other numbers.
_LIKE_ANOTHER = {
    "paligemma2",
    "smolvlm",
    "llava_next_video",
    "vipllava",
    "llava-pixtral",
    "qwen3_vl-flat",
    "qwen3_vl_moe",
    "qwen2_5_vl",
    "glm46v",
    "glm4v_moe",
    "fast_vlm",
}
_LISTED = tuple(kind for table in (*_TABLES, *_BRIEF_TABLES) for kind in table.KINDS)
EVERY: tuple[Kind, ...] = tuple(kind for kind in _LISTED if can_be_built(kind))
NOT_BUILT = tuple(kind.name for kind in _LISTED if kind not in EVERY)
IN_FULL: tuple[Kind, ...] = tuple(
    kind
    for table in _TABLES
    for kind in table.KINDS
    if kind in EVERY and kind.name not in _LIKE_ANOTHER
)
IN_BRIEF: tuple[Kind, ...] = tuple(kind for kind in EVERY if kind not in IN_FULL)


def rows(kinds: Iterable[Kind], often: Collection[Kind] = IN_FULL) -> Any:
    """A parametrization by ``kind``; the rows that are not among ``often`` are marked slow."""
    found = [
        kind if kind in often else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds
    ]
    if not found:
        why = pytest.mark.skip(reason="this version of transformers has no such model")
        found = [pytest.param(None, marks=why, id="none")]
    return pytest.mark.parametrize("kind", found, ids=lambda kind: kind.name)


every_kind = rows(EVERY)
brief_kind = rows(IN_BRIEF, IN_BRIEF)
_FIRST = tuple(kind for table in _TABLES for kind in table.KINDS[:1])
one_of_each_table = rows(EVERY, _FIRST)
_BRIEF_FIRST = tuple(kind for table in _BRIEF_TABLES for kind in table.KINDS[:1])
one_of_each_brief_table = rows(IN_BRIEF, _BRIEF_FIRST)
with_videos = rows(kind for kind in EVERY if kind.videos)
brief_with_videos = rows((kind for kind in IN_BRIEF if kind.videos), _BRIEF_FIRST)
ROTARY_PLACES = (*mrope.KINDS, *more_mrope.KINDS, *hybrids.ROTARY_PLACES)
with_rotary_places = rows(ROTARY_PLACES)
