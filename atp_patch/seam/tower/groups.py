"""The attention that the decoder's tokens get in one block of a vision tower, group by group.

A group is one image, tile or frame, within which the tower attends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atp_patch.contract import TokenGroups, Tower
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.maths import cross_scores, visible_keys
from atp_patch.seam.host.recorder import Recording

# From the tokens of each group and its placeholders to how many tokens are kept of each; None where
# the method decides.
Counter = Callable[[Sequence[int], Sequence[int]], tuple[int, ...] | None]


class PatchGrid(NamedTuple):
    """One picture or video in a tower that takes pictures of any size.

    Attributes:
        frames, height, width: how many frames it has, and rows and columns of patches.
        cell: how many patches lie along a side of the square that becomes one token.
    """

    frames: int
    height: int
    width: int
    cell: int


def blocks_of(tower: nn.Module, about: Tower) -> Any:
    """Return the list of a tower's blocks."""
    # In early versions of transformers the tower is a model around the one that has the blocks.
    inner: Any = getattr(tower, "vision_model", tower)
    return inner.get_submodule(about.blocks)


@torch.no_grad()
def tower_groups(
    about: Tower,
    recorded: Sequence[Recording],
    grids: Sequence[PatchGrid],
    shape: Sequence[int],
    counts: Counter,
    minimum: int,
    *,
    every_query: bool = False,
) -> tuple[TokenGroups, Tensor]:
    """Return the groups of one call of a tower, and (G, n) int64 the row of each token among its
    features.

    Args:
        about: where the tower's parts are, and what its tokens are like.
        recorded: the attention of one block, in one call or more.
        grids: those of all pictures, where the tower takes pictures of any size.
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
    """Return the groups of a tower that takes square pictures."""
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
    if about.class_last:
        query, key = recording.query.roll(1, 2), recording.key.roll(1, 2)
        recording = Recording(query, key, None, recording.scaling)
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
    grids: Sequence[PatchGrid],
    counts: Counter,
    minimum: int,
) -> tuple[TokenGroups, Tensor]:
    """Return the groups of a tower that takes pictures of any size."""
    pictures = list(_pictures(about, recorded, grids))
    frames = [size for size, _, _ in pictures]
    tokens = [height * width for height, width in frames]
    key = recorded[0].key
    device, longest = key.device, max(tokens)
    shape = (len(frames), longest)
    attention = torch.zeros(shape, device=device)
    keys = torch.zeros(*shape, key.shape[1] * key.shape[3], device=device)
    row, column, place = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(3))
    start = 0
    for number, ((height, width), paid, made) in enumerate(pictures):
        count = tokens[number]
        attention[number, :count], keys[number, :count] = paid, made
        # Patches that lie row by row are put back in this order before tokens are made of them.
        order = window_order(height, width, 0 if about.by_rows else about.window).to(device)
        row[number, :count], column[number, :count] = order // width, order % width
        place[number, :count] = torch.arange(start, start + count, device=device)
        start += count
    valid = torch.arange(longest, device=device) < torch.tensor(tokens, device=device)[:, None]
    heights, widths = zip(*frames, strict=True)
    groups = TokenGroups(
        attention, keys, valid, row, column, heights, widths, counts(tokens, tokens), minimum
    )
    return groups, place


def _pictures(
    about: Tower, recorded: Sequence[Recording], grids: Sequence[PatchGrid]
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Return, for each frame, its rows and columns of tokens, their attention (n,) and their keys
    (n, d).

    All pictures stand in one row, or each stands in one of its own with padding behind it.
    """
    query, key = (
        torch.cat([getattr(part, name) for part in recorded], 2) for name in ("query", "key")
    )
    start = 0
    for number, grid in enumerate(grids):
        height, width = grid.height // grid.cell, grid.width // grid.cell
        if not height * width:  # padding in place of a picture
            continue
        row, tokens = 0 if about.packed else number, height * width
        frame = _cell_by_cell(about, grid).to(key.device)
        frames: list[tuple[Tensor, Tensor]] = []
        for _ in range(grid.frames):
            place = frame + start
            start += grid.height * grid.width if about.packed else 0
            asked, held = (table[row : row + 1, :, place] for table in (query, key))
            paid, made = _received(Recording(asked, held, None, recorded[0].scaling), 0)
            frames.append(
                (paid[0].view(tokens, -1).sum(1), made[0].unflatten(0, (tokens, -1)).mean(1))
            )
        step = min(about.joined, len(frames))
        for last in range(step, len(frames) + 1, step):
            attention, keys = zip(*frames[last - step : last], strict=True)
            yield (height, width), torch.stack(attention).sum(0), torch.stack(keys).mean(0)


def _cell_by_cell(about: Tower, grid: PatchGrid) -> Tensor:
    """Return (patches,) int64: where the patches of a frame stand, cell by cell."""
    place, cell = torch.arange(grid.height * grid.width), grid.cell
    if not about.by_rows:
        return place
    rows = place.view(grid.height, grid.width).unfold(0, cell, cell).unfold(1, cell, cell).flatten()
    return window_order(grid.height, grid.width, about.window).argsort()[rows]


def window_order(height: int, width: int, window: int) -> Tensor:
    """Return (height * width,) int64: the grid's places, window by window, each in reading order.

    Args:
        height, width: the grid's rows and columns.
        window: how many places lie along a side of a window; 0 where the whole grid is one.
    """
    place = torch.arange(height * width)
    if not window:
        return place
    row, column = place // width, place % width
    across = -(-width // window)
    return ((row // window) * across + column // window).argsort(stable=True)


def _received(recording: Recording, lead: int, every_query: bool = False) -> tuple[Tensor, Tensor]:
    """Return the attention that each patch gets (G, n), and all heads' keys of it (G, n, d),
    float32.

    With a class token (``lead`` is 1) it is the class token's attention among the patches (PruMerge
    eq. 2), else the attention of all patches on average; with ``every_query`` it is that of all
    tokens on average, of which each pays a part to the class token. Padding that the tower masks
    out pays and gets nothing.
    """
    query, key = recording.query, recording.key
    batch, device = key.shape[0], key.device
    patch = torch.arange(lead, key.shape[2], device=device).expand(batch, -1)
    seen = _seen(recording)
    rows, pays = query, seen
    if lead and not every_query:
        rows, pays = query[:, :, :1], seen[:, :1]
    attention = cross_scores(
        rows,
        key,
        pays,
        patch,
        seen[:, lead:],
        recording.scaling,
        renormalise=not every_query,
        chunk_rows=256,
    )
    return attention, key[:, :, lead:].transpose(1, 2).flatten(2).float()


def _seen(recording: Recording) -> Tensor:
    """Return (G, n) bool: the patches that at least one patch of their picture may see."""
    mask, key = recording.mask, recording.key
    if mask is None:
        return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    seen = visible_keys(mask)
    while seen.dim() > 2:  # (G, 1, n, n), or (G, n) for some attention implementations
        seen = seen.any(1)
    return seen.expand(key.shape[0], -1)
