"""Checks of what picture and tower methods answer, before anything is done with it."""

from __future__ import annotations

from dataclasses import replace
from operator import index as as_integer
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.checks import LOOK_AT_FEATURES, check_tensor, raise_first
from atp_patch.contract.errors import DecisionError
from atp_patch.contract.tower import Merge, TokenGroups


def check_grid(
    grid: Any, height: int, width: int, minimum: int, *, square: bool, method: str
) -> tuple[int, int]:
    """Check the grid that a picture method chose in place of a larger one, and return it.

    Args:
        grid: what the method returned.
        height, width: the size of the larger grid.
        minimum: number of tokens that the new grid must have at least, as far as the larger one has
            so many.
        square: whether the new grid must be square.
        method: the name of the method, for the message.

    Raises:
        DecisionError: if it is no pair of integers, has no or more rows or columns than the larger
            grid, is not square where it must be, or has too few tokens.
    """
    try:
        rows, columns = map(as_integer, grid)
    except (TypeError, ValueError):
        raise DecisionError(
            f"{method}: grid() returned {grid!r}; return two integers, the height and width of the "
            "new grid."
        ) from None
    where = f"{method}: grid() returned {(rows, columns)} for a grid of {height} x {width}"
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise DecisionError(
            f"{where}; return a height from 1 to {height} and a width from 1 to {width}."
        )
    if square and rows != columns:
        raise DecisionError(f"{where}; this tower needs a square one (square=True).")
    if rows * columns < min(minimum, height * width):
        raise DecisionError(f"{where}; return one of at least minimum={minimum} tokens.")
    return rows, columns


def check_merge(merge: Any, groups: TokenGroups, method: str) -> Merge:
    """Check that a tower method answered for the tokens that it saw, and return its answer.

    All values are read from the device at once.

    Args:
        merge: what the method returned.
        groups: what the method saw.
        method: the name of the method, for the message.

    Returns:
        The answer, whose ``keep`` is False in padding slots.

    Raises:
        DecisionError: if a shape, dtype or device is wrong, ``index`` does not name the kept
            tokens in order, a weight is not finite, or a group keeps too few tokens.
    """
    if not isinstance(merge, Merge):
        raise DecisionError(
            f"{method}: merge() returned {type(merge).__name__}; return an atp_patch.Merge."
        )
    number, longest = groups.valid.shape
    slots = _slots(merge, number, method)

    def check(name: str, shape: tuple[int, ...], kind: str) -> None:
        basis = f"for the {number} groups of up to {longest} tokens"
        value = getattr(merge, name)
        check_tensor(f"{method}: {name}", value, shape, kind, basis, groups.valid)

    check("keep", (number, longest), "bool")
    check("index", (number, slots), "int64")
    check("weight", (number, slots, longest), "float32")
    check("changed", (number, slots), "bool")
    merge = replace(merge, keep=merge.keep & groups.valid)
    raise_first(_wrong_values(merge, groups), method, groups.valid)
    return merge


def _slots(merge: Merge, number: int, method: str) -> int:
    """Return the number of kept tokens for which a merge has room, as its ``index`` says."""
    index: Any = merge.index
    if not isinstance(index, Tensor) or index.ndim != 2:
        found = tuple(index.shape) if isinstance(index, Tensor) else type(index).__name__
        raise DecisionError(
            f"{method}: index is {found}; give a tensor ({number}, m), where m is the number of "
            "tokens kept in the group that keeps most."
        )
    return index.shape[1]


def _wrong_values(merge: Merge, groups: TokenGroups) -> dict[tuple[str, str], Tensor]:
    """Return, for each possible fault and its mend, a bool scalar on the device.

    Faults that cause others come first, so that the message names the cause.
    """
    keep, index, valid = merge.keep, merge.index, groups.valid
    slots, longest = index.shape[1], valid.shape[1]
    kept = keep.sum(1)
    least = valid.sum(1).clamp(max=groups.minimum)
    if groups.counts is not None:
        least = torch.minimum(least, torch.tensor(groups.counts, device=valid.device))
    used = torch.arange(slots, device=valid.device) < kept[:, None]
    outside = ((index < 0) | (index >= longest)).any()
    inside = index.clamp(0, max(longest - 1, 0))
    dropped = used & ~keep.gather(1, inside)
    falling = used[:, 1:] & (index[:, 1:] <= index[:, :-1])
    name_kept = "name the columns of keep's tokens from left to right, then 0"
    return {
        (
            f"a group keeps fewer than minimum={groups.minimum} of its tokens",
            "keep at least the best so many",
        ): (kept < least).any(),
        (f"index names tokens outside of the groups' {longest}", name_kept): outside,
        (
            f"a group keeps more tokens than index has room for ({slots})",
            "make it as wide as the group that keeps most",
        ): (kept > slots).any(),
        ("index names tokens that keep drops", name_kept): dropped.any(),
        ("index does not name the kept tokens in order", name_kept): falling.any(),
        (
            "changed is True in slots of index that no kept token has",
            "leave it False there",
        ): (merge.changed & ~used).any(),
        ("weight holds numbers that are not finite", LOOK_AT_FEATURES): (
            ~merge.weight.isfinite().all(-1) & merge.changed
        ).any(),
    }
