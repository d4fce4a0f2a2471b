"""Each test's family is written beside its result, for `python -m tests.matrix`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from atp_patch.families import family_of
from tests.families.hosts import can_be_built


@cache
def _family(kind: Any) -> str:
    return family_of(kind.config()).name


@cache
def _family_outside(case: Any) -> str:
    return family_of(case.build().config).name


@pytest.fixture(autouse=True)
def _named(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    if "kind" in given:
        if not can_be_built(given["kind"]):
            pytest.skip("this version of transformers refuses its own config")
        record_property("family", _family(given["kind"]))
        record_property("model", given["kind"].name)
    elif "case" in given:
        record_property("family", _family_outside(given["case"]))
        record_property("model", given["case"].name)
    elif request.node.path.stem == "test_generic":
        record_property("family", "generic")
        record_property("model", "generic")
