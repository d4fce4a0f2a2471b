"""A model as it was, where something fails while it is being changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unchanged_on_failure(objects: Iterable[object]) -> Iterator[None]:
    """Give objects all their attributes back if the block raises, whatever it had done to them.

    The tables and lists among the attributes (a module's hooks, children and parameters) are
    refilled in place, since handles of hooks refer to them. Tensors and what lies deeper are not
    copied: the block must not write into them.
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
    """Attributes, and each table or list among them beside a copy of its entries."""
    tables = [value for value in attributes.values() if isinstance(value, (dict, list))]
    return dict(attributes), [(table, table.copy()) for table in tables]
