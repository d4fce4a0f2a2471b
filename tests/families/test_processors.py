"""Grids on what real processors make of pictures of odd sizes: tall, wide, 1 x 1, huge; several in
a prompt; none; and of videos.

Video processors need torchvision, and so do some image processors. Where it is not installed, a
stand-in takes a video processor's place, and rows with pictures run as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest

import atp_patch
from atp_patch.families import FAMILIES, family_of
from tests.families.hosts import HOST, NEWEST
from tests.families.kinds import Kind
from tests.families.processor_rows import REAL
from tests.families.processors import DOT, TORCHVISION, Clip, Prompt, Real, processed, row_of
from tests.families.tables import EVERY
from tests.families.test_every_family import check_grids, patched

TALL, WIDE, HUGE, SQUARE = (300, 7), (7, 300), (900, 1300), (64, 64)
FEW = ((WIDE,), (DOT, TALL), ())
MANY = ((HUGE,), (TALL, WIDE, DOT), (SQUARE, HUGE), (), (DOT,))
FILMS = ((Clip(4, (40, 90)),), (Clip(6, (90, 33)),), ())
MIXED = ((Clip(5, (33, 90)), WIDE), (SQUARE, Clip(2, TALL), Clip(4, (16, 16))))

WITHOUT = {
    "vila": "its processor is part of VILA's own package",
    "internvl_chat": "its processor is code that lies beside the checkpoints",
    "generic": "it serves decoders that no family knows, and has no processor",
}


def rows(reals: Iterable[Real], *, of_films: bool = False) -> Any:
    """A parametrization by the row of the families' table and the real processor."""
    found = []
    for real in reals:
        missing = not TORCHVISION and (real.torchvision or of_films)
        part = "video" if of_films else "image"
        marks = [pytest.mark.skipif(missing, reason=f"its {part} processor needs torchvision")]
        if real.package is not None:
            absent = find_spec(real.package) is None
            marks.append(pytest.mark.skipif(absent, reason=f"it needs {real.package}"))
        marks += [] if real.often else [pytest.mark.slow]
        found.append(pytest.param(row_of(real), real, id=real.kind, marks=marks))
    return pytest.mark.parametrize(("kind", "real"), found)


every = rows(REAL)
with_films = rows((real for real in REAL if real.frames is not None), of_films=True)


def check(kind: Kind, real: Real, prompts: Sequence[Prompt]) -> None:
    model = patched(kind, method="uniform")
    calls = [prompts] if real.batches else [[prompt] for prompt in prompts if prompt]
    for call in calls:
        check_grids(model, processed(real, call))
        found = atp_patch.last_trace(model).layout.grids
        assert [bool(grids) for grids in found] == [bool(prompt) for prompt in call]


@every
def test_grids_of_what_the_processor_makes(kind: Kind, real: Real) -> None:
    check(kind, real, FEW)


@pytest.mark.slow
@every
def test_grids_of_huge_pictures_and_of_several(kind: Kind, real: Real) -> None:
    check(kind, real, MANY)


@with_films
def test_grids_of_videos(kind: Kind, real: Real) -> None:
    check(kind, real, FILMS)


@pytest.mark.slow
@with_films
def test_grids_of_videos_of_odd_sizes_and_of_pictures_beside_them(kind: Kind, real: Real) -> None:
    prompts: Sequence[Prompt] = MIXED
    if not kind.mixes:
        prompts = [[one for one in prompt if isinstance(one, Clip)] for prompt in MIXED]
    check(kind, real, [prompt[:1] for prompt in prompts] if real.one_film else prompts)


def test_every_family_has_a_processor_here_or_a_reason() -> None:
    assert {kind.name for kind in EVERY} == {real.kind for real in REAL}
    if HOST < NEWEST:
        pytest.skip("this version of transformers lacks some of the families")
    shown = {family_of(row_of(real).config()).name for real in REAL}
    assert {family.name for family in FAMILIES} - shown == set(WITHOUT)
