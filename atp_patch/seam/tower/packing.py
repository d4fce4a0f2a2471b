"""Following the tower's tokens where the host puts tiles together, cuts or shrinks them.

LLaVA-NeXT and its kin do so behind the projector, in methods of the model without its head. Such a
method moves or mixes rows alike for every channel. What was read of the tower is therefore given
to the same method in place of the features, and comes out in the places of the features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from atp_patch.seam.host.replaced import Replaced


@dataclass(frozen=True)
class ReadGroup:
    """What one block made of one image, tile or frame.

    Attributes:
        size: its rows and columns of tokens.
        table: (height * width, channels) float32 in reading order: attention, key, class token and
            state side by side.
    """

    size: tuple[int, int]
    table: Tensor


Groups = list[ReadGroup]
# From the groups of one call of the tower to those that stand in the prompt.
Repack = Callable[[Groups], Groups]


class Packer:
    """Stands in for a method of the base model that packs the projector's features.

    Args:
        base: the model without its head.
        name: the name of the method. Its first argument is the features: one tensor (frames,
            tokens, D) that becomes smaller, or for each picture one (tiles, tokens, D), from which
            rows with a newline behind each are made.
        follow: called behind the method with a function that packs groups as the method packed
            the features.
    """

    def __init__(self, base: Any, name: str, follow: Callable[[Repack], None]) -> None:
        self.base, self.name, self.follow = base, name, follow
        self._replaced: Replaced | None = None

    def install(self) -> None:
        """Put this object in the method's place."""
        self._replaced = Replaced(self.base, self.name, self)

    def remove(self) -> None:
        """Put the method back."""
        if self._replaced is not None:
            self._replaced.restore()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the host's method, and apply it to what was read of the tower too."""
        assert self._replaced is not None
        method = self._replaced.original
        output = method(*args, **kwargs)
        self.follow(lambda groups: _repacked(method, args, kwargs, groups))
        return output


def _repacked(
    method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], groups: Groups
) -> Groups:
    """Return the groups, packed as the method packs features.

    Args:
        method: the host's method.
        args, kwargs: what it was called with.
        groups: what was read of each tile or frame; all have one size.
    """
    bound = inspect.signature(method).bind(*args, **kwargs)
    features = next(iter(bound.arguments))
    tables = torch.stack([group.table for group in groups])
    if isinstance(bound.arguments[features], Tensor):
        bound.arguments[features] = tables
        made = method(*bound.args, **bound.kwargs)
        side = round(made.shape[1] ** 0.5)
        return [ReadGroup((side, side), table) for table in made]
    # One more channel is 1 in newlines and 0 in tokens.
    newline = pad(tables.new_zeros(tables.shape[-1]), (0, 1), value=1.0)
    tiles = [len(picture) for picture in bound.arguments[features]]
    bound.arguments[features] = pad(tables, (0, 1)).split(tiles)
    bound.arguments["image_newline"] = newline
    pictures, _ = method(*bound.args, **bound.kwargs)
    return [group for picture in pictures for group in _whole_and_picture(picture, groups[0].size)]


def _whole_and_picture(rows: Tensor, size: tuple[int, int]) -> Iterator[ReadGroup]:
    """Return the view of the whole, and the unpadded picture if it has a row and a column.

    Args:
        rows: (tokens and newlines of one picture, channels + 1).
        size: rows and columns of the view.
    """
    view, rest = rows.tensor_split([size[0] * size[1]])
    yield ReadGroup(size, view[:, :-1])
    ends = rest[:, -1].nonzero().flatten().tolist()
    if ends and ends[0]:
        height, width = len(ends), ends[0]
        table = rest.unflatten(0, (height, width + 1))[:, :width, :-1]
        yield ReadGroup((height, width), table.flatten(0, 1))
