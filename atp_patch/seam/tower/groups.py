"""The attention that the decoder's tokens get in one block of a vision tower, group by group.

A group is one image, tile or frame, within which the tower attends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atp_patch.contract import TokenGroups, Tower
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.maths import cross_scores
from atp_patch.seam.host.recorder import Recording

# From the tokens of each group and its placeholders to how many tokens are kept of each; None where
# the method decides.
Counter = Callable[[Sequence[int], Sequence[int]], tuple[int, ...] | None]


def blocks_of(tower: nn.Module, about: Tower) -> Any:
    """The list of a tower's blocks."""
    # In early versions of transformers the tower is a model around the one that has the blocks.
    inner: Any = getattr(tower, "vision_model", tower)
    return inner.get_submodule(about.blocks)


@torch.no_grad()
def tower_groups(
    about: Tower,
    recorded: Sequence[Recording],
    grids: Sequence[tuple[int, int, int]],
    shape: Sequence[int],
    counts: Counter,
    minimum: int,
    *,
    every_query: bool = False,
) -> tuple[TokenGroups, Tensor]:
    """The groups of one call of a tower, and (G, n) int64 the row of each token among its features.

    Args:
        about: where the tower's parts are, and what its tokens are like.
        recorded: the attention of one block, in one call or more.
        grids: the frames, height and width of each picture in patches, where the tower takes
            pictures of any size.
        shape: the shape of the projector's features without the last dimension.
        counts: the budget.
        minimum: how many tokens each group keeps at least.
        every_query: count the attention of all tokens where the tower has a class token too.

    Raises:
        UnsupportedModelError: where the patches cannot be matched with tokens.
    """
    if about.packed or about.sizes:
        return _packed(about, recorded, grids, counts, minimum)
    return _square(about, recorded[0], shape, counts, minimum, every_query)


def _square(
    about: Tower,
    recording: Recording,
    shape: Sequence[int],
    counts: Counter,
    minimum: int,
    every_query: bool,
) -> tuple[TokenGroups, Tensor]:
    """The groups of a tower that takes square pictures."""
    number, rows = shape[0], math.prod(shape[1:])
    lead = int(about.class_token)
    patches = recording.key.shape[2] - lead
    extra = lead if rows == recording.key.shape[2] else 0
    side, cells = round(patches**0.5), round((patches / max(rows - extra, 1)) ** 0.5)
    small = side // max(cells, 1)
    if side**2 != patches or small**2 != rows - extra or small * cells != side:
        raise UnsupportedModelError(
            f"{patches} patches became {rows} tokens, which form no square grid, so that patches "
            "and tokens cannot be matched; use a method that prunes inside the decoder."
        )
    attention, key = _received(recording, lead, every_query)
    device = attention.device

    def joined(table: Tensor) -> Tensor:  # (G, patches, *) -> (G, tokens, cell, *)
        parts = table.unflatten(1, (small, cells, small, cells)).transpose(2, 3)
        return parts.flatten(3, 4).flatten(1, 2)

    token = torch.arange(small**2, device=device).expand(number, -1)
    place = torch.arange(number, device=device)[:, None] * rows + extra + token
    tokens = [small**2] * number
    groups = TokenGroups(
        attention=joined(attention).sum(2),
        key=joined(key).mean(2),
        valid=torch.ones_like(token, dtype=torch.bool),
        row=token // small,
        column=token % small,
        heights=[small] * number,
        widths=[small] * number,
        counts=counts(tokens, [rows] * number),
        minimum=minimum,
    )
    return groups, place


def _packed(
    about: Tower,
    recorded: Sequence[Recording],
    grids: Sequence[tuple[int, int, int]],
    counts: Counter,
    minimum: int,
) -> tuple[TokenGroups, Tensor]:
    """The groups of a tower that takes pictures of any size."""
    cell = about.cell
    frames = [(h // cell, w // cell) for t, h, w in grids for _ in range(t)]
    tokens = [height * width for height, width in frames]
    key = recorded[0].key
    device, longest = key.device, max(tokens)
    shape = (len(frames), longest)
    attention = torch.zeros(shape, device=device)
    keys = torch.zeros(*shape, key.shape[1] * key.shape[3], device=device)
    row, column, place = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(3))
    start = 0
    pictures = _row_by_row if about.sizes else _cell_by_cell
    for number, one in enumerate(pictures(about, recorded, frames)):
        (height, width), count = frames[number], tokens[number]
        paid, made = _received(one, 0)
        attention[number, :count] = paid[0].unflatten(0, (count, -1)).sum(1)
        keys[number, :count] = made[0].unflatten(0, (count, -1)).mean(1)
        order = window_order(height, width, about.window).to(device)
        row[number, :count], column[number, :count] = order // width, order % width
        place[number, :count] = torch.arange(start, start + count, device=device)
        start += count
    valid = torch.arange(longest, device=device) < torch.tensor(tokens, device=device)[:, None]
    heights, widths = zip(*frames, strict=True)
    groups = TokenGroups(
        attention, keys, valid, row, column, heights, widths, counts(tokens, tokens), minimum
    )
    return groups, place


def _cell_by_cell(
    about: Tower, recorded: Sequence[Recording], frames: Sequence[tuple[int, int]]
) -> Iterator[Recording]:
    """The attention of each frame, in a tower that takes all in one row, cell by cell."""
    query, key = (
        torch.cat([getattr(part, name) for part in recorded], 2) for name in ("query", "key")
    )
    start = 0
    for height, width in frames:
        part = slice(start, start := start + height * width * about.cell**2)
        yield Recording(query[:, :, part], key[:, :, part], None, recorded[0].scaling)


def _row_by_row(
    about: Tower, recorded: Sequence[Recording], frames: Sequence[tuple[int, int]]
) -> Iterator[Recording]:
    """The attention of each picture, cell by cell, in a tower whose patches lie row by row.

    All pictures stand in one row, or each stands in one of its own with padding behind it.
    """
    (made,), cell = recorded, about.cell
    start = 0
    for number, (height, width) in enumerate(frames):
        row = 0 if about.packed else number
        place = torch.arange(height * width * cell**2, device=made.key.device)
        place = place.view(height, cell, width, cell).transpose(1, 2).flatten() + start
        start += len(place) if about.packed else 0
        query, key = (table[row : row + 1, :, place] for table in (made.query, made.key))
        yield Recording(query, key, None, made.scaling)


def window_order(height: int, width: int, window: int) -> Tensor:
    """(height * width,) int64: the grid's places, window by window, each in reading order.

    Args:
        height, width: the grid's rows and columns.
        window: how many tokens lie along a side of a window; 0 where the whole grid is one.
    """
    place = torch.arange(height * width)
    if not window:
        return place
    row, column = place // width, place % width
    across = -(-width // window)
    return ((row // window) * across + column // window).argsort(stable=True)


def _received(recording: Recording, lead: int, every_query: bool = False) -> tuple[Tensor, Tensor]:
    """The attention that each patch gets (G, n), and all heads' keys of it (G, n, d), float32.

    With a class token (``lead`` is 1) it is the class token's attention among the patches (PruMerge
    eq. 2), else the attention of all patches on average; with ``every_query`` it is that of all
    tokens on average, of which each pays a part to the class token.
    """
    query, key = recording.query, recording.key
    batch, device = key.shape[0], key.device
    patch = torch.arange(lead, key.shape[2], device=device).expand(batch, -1)
    rows = query[:, :, :1] if lead and not every_query else query
    attention = cross_scores(
        rows,
        key,
        torch.ones(batch, rows.shape[2], dtype=torch.bool, device=device),
        patch,
        torch.ones_like(patch, dtype=torch.bool),
        recording.scaling,
        renormalise=not every_query,
        chunk_rows=256,
    )
    return attention, key[:, :, lead:].transpose(1, 2).flatten(2).float()
