"""Undoing a change of a model that fails halfway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unchanged_on_failure(objects: Iterable[object]) -> Iterator[None]:
    """Restore all attributes of some objects if the block raises.

    Dicts and lists among the attributes (a module's hooks, children and parameters) are refilled in
    place, because handles of hooks refer to them. Tensors and deeper contents are not copied, so
    the block must not write into them.
    """
    saved = [(vars(one), *_copied(vars(one))) for one in objects]
    try:
        yield
    except BaseException:
        for now, before, contents in saved:
            now.clear()
            now.update(before)
            for table, content in contents:
                table.clear()
                (table.update if isinstance(table, dict) else table.extend)(content)
        raise


def _copied(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Copy the attributes, and pair each dict or list among them with a copy of its contents."""
    tables = [value for value in attributes.values() if isinstance(value, (dict, list))]
    return dict(attributes), [(table, table.copy()) for table in tables]
