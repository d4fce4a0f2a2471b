"""The rivals of each measured setting, with which it is compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from atp_patch.evaluation.settings import BASELINES, BLIND, DROPPED, UNPRUNED

if TYPE_CHECKING:
    from atp_patch.evaluation.summary import Row

_GIVEN = (UNPRUNED, BLIND, DROPPED)
_AS_MANY = 0.05


def rivals(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """Return the rows that a setting's accuracy is compared with, each under the name of its
    column.

    - A setting with a budget has the first method and the baselines at the same budget, and before
      the same layers where they were measured so.
    - An adapter has its controls, the first adapter, and those methods before the same layers that
      keep as many tokens on average, to a twentieth.
    - A method that decides itself how many to keep has the baselines that keep as many.
    """
    setting = row.setting
    if row.unreachable is not None or setting.control is not None or setting.name in _GIVEN:
        return {}
    reached = [o for o in rows if o.unreachable is None]
    others = [o for o in reached if o is not row]
    methods = [o for o in others if o.setting.adapter is None and o.setting.name not in _GIVEN]
    if setting.adapter is not None:
        first = [o for o in reached if o.setting.adapter is not None][:1]
        peers = [o for o in first + methods if o is not row and o.layers == row.layers]
        return _controls(row, others) | _by_name(o for o in peers if _keep_as_many(o, row))
    if setting.budget is None:
        baselines = (o for o in methods if o.setting.name in BASELINES)
        return _by_name(o for o in baselines if _keep_as_many(o, row))
    same = [o for o in reached if o.setting.budget == setting.budget]
    chosen = {}
    for name in dict.fromkeys([same[0].setting.name, *BASELINES]):
        named = [o for o in same if o.setting.name == name]
        alike = [o for o in named if o.setting.layers == setting.layers]
        if named and name != setting.name:
            chosen[name] = (alike or named)[0]
    return chosen


def _controls(row: Row, others: Iterable[Row]) -> dict[str, Row]:
    return {
        f"its {other.setting.control}": other
        for other in others
        if other.setting.name == f"{row.setting.name}~{other.setting.control}"
        and other.setting.adapter == row.setting.adapter
    }


def _by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the first row of each name."""
    return {row.setting.name: row for row in reversed(list(rows))}


def _keep_as_many(one: Row, other: Row) -> bool:
    return abs(one.average_tokens - other.average_tokens) <= _AS_MANY * other.average_tokens
