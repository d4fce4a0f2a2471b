"""The contract of a method: what it sees before a layer -> what it keeps.

A method is a frozen dataclass: its fields are its options, checked when it is made, written to an
adapter's JSON, and never changed after. What it learns, if anything, lives in a module of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atp_patch.contract import Decision, Layout, Merge, TokenGroups, View
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import even_counts, top_k_mask


@dataclass(frozen=True)
class ModuleSpec:
    """What a method's learned module is built for.

    Attributes:
        layers: the pruning layers.
        hidden_size: of the decoder.
        shares: of all visual tokens, what an untrained module is to leave after each pruning layer.
    """

    layers: tuple[int, ...]
    hidden_size: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Strategy(ABC):
    """What every method has: a name, and options as its fields.

    Class attributes:
        name: what ``patch_model(method=...)`` calls it.
        summary: one line for listings.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def needs_budget(self) -> bool:
        """Whether the method keeps a given number of tokens (else it decides how many by
        itself).
        """
        return True

    @property
    def takes_budget(self) -> bool:
        """Whether the method keeps a given number of tokens where one is given."""
        return True

    def options(self) -> dict[str, Any]:
        """The fields, for an adapter's JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Method(Strategy):
    """Base class of every method that prunes inside the decoder."""

    @abstractmethod
    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Choose which of the view's visual tokens go on (``module`` is what ``build`` made)."""

    def build(self, spec: ModuleSpec) -> nn.Module | None:
        """The module that holds what the method learns, or None."""
        return None

    def losses(
        self,
        counts: Sequence[Tensor],
        totals: Tensor,
        layers: Sequence[int],
        num_layers: int,
        target: float,
    ) -> dict[str, tuple[float, Tensor]]:
        """What training adds to the host's loss: name -> its weight and a scalar.

        Args:
            counts: (B,) float with a gradient, tokens left after each pruning layer.
            totals: (B,) float, tokens before any pruning.
            target: visual tokens averaged over all decoder layers that are aimed at.
        """
        return {}


@dataclass(frozen=True)
class Merger(Strategy):
    """Base class of methods that make fewer tokens of the vision tower's, before the decoder."""

    @abstractmethod
    def merge(self, groups: TokenGroups) -> Merge:
        """Choose tokens of each group, and what goes into each."""


@dataclass(frozen=True)
class Shrinker(Strategy):
    """Base class of methods that shrink pictures, so that the tower makes fewer tokens."""

    @abstractmethod
    def grid(
        self, height: int, width: int, count: int, least: int, *, square: bool
    ) -> tuple[int, int]:
        """The grid of about ``count`` tokens, ``least`` at least, that one of ``height`` x
        ``width`` becomes.
        """


@dataclass(frozen=True)
class Compressor(Strategy):
    """Base class of methods that put learned tokens behind an image, which stand for it later on.

    Attributes:
        num_tokens: learned tokens of each segment.
        segment_frames: frames of a video that are a segment; None: all of them.
    """

    num_tokens: int
    segment_frames: int | None

    @abstractmethod
    def build(self, hidden_size: int) -> nn.Module:
        """The module that holds the tokens' ``embedding`` (num_tokens, hidden_size)."""


BeforeDecoder = Merger | Shrinker


@dataclass(frozen=True)
class Ranking(Method):
    """Base class of methods that keep the best by a score.

    Attributes:
        per_frame: every frame of a video, and every image and tile, keeps the same share of its
            tokens. Else all visual tokens of a sample compete for one budget.
    """

    per_frame: bool = False

    def best(self, view: View, scores: Tensor, counts: Tensor | None = None) -> Tensor:
        """As :func:`keep_best`, frame by frame if that was asked for."""
        if not self.per_frame:
            return keep_best(view, scores, counts)
        frame, shares = frame_counts(view, view.counts_tensor() if counts is None else counts)
        keep = torch.zeros_like(view.slot_valid)
        for number in range(shares.shape[1]):
            keep |= top_k_mask(scores, view.slot_valid & (frame == number), shares[:, number])
        return keep


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check an option that is one of a few words."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}.")


def keep_best(view: View, scores: Tensor, counts: Tensor | None = None) -> Tensor:
    """(B, V) bool: the best so many by score; every image's best few come first.

    Args:
        scores: (B, V); higher is kept. Ties keep the earlier token.
        counts: (B,) int64; the view's by default.
    """
    first = best_of_each_image(view, scores)
    if first is not None:
        scores = scores.masked_fill(first, torch.inf)
    return top_k_mask(scores, view.slot_valid, view.counts_tensor() if counts is None else counts)


def frame_counts(view: View, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V) int64 number of each token's frame within its sample, and (B, F) int64 how many tokens
    each frame keeps, in proportion to what it has; an image or tile is one frame.

    Args:
        counts: (B,) int64 tokens that each sample keeps.
    """
    grids, device = view.layout.grids, view.slot.device
    starts = [[0, *accumulate(grid.frames for grid in sample)] for sample in grids]
    width, total = max(map(len, starts)), max(start[-1] for start in starts)
    first = torch.tensor([start + [0] * (width - len(start)) for start in starts], device=device)
    frame = first.gather(1, view.of_token(view.layout.image)) + view.of_token(view.layout.frame)
    sizes = torch.zeros(len(grids), total, dtype=torch.long, device=device)
    sizes.scatter_add_(1, frame.clamp(max=total - 1), view.slot_valid.long())
    shares = torch.zeros_like(sizes, device="cpu")
    rows = zip(starts, sizes.tolist(), counts.tolist(), strict=True)
    for b, (start, left, count) in enumerate(rows):
        parts = [left[a:z] for a, z in pairwise(start)]
        images = even_counts(count, [sum(part) for part in parts], view.min_per_image)
        for at, part, own in zip(start, parts, images, strict=False):
            shares[b, at : at + len(part)] = torch.tensor(even_counts(own, part, 0))
    return frame, shares.to(device)


def least_counts(view: View) -> Tensor:
    """(B,) int64: visual tokens that must stay, of those that are left."""
    images = torch.tensor([len(grids) for grids in view.layout.grids], device=view.slot.device)
    least = (images * view.min_per_image).clamp(min=view.min_tokens)
    return torch.minimum(least, view.slot_valid.sum(1))


def best_of_each_image(view: View, scores: Tensor) -> Tensor | None:
    """(B, V) bool: the ``min_per_image`` best surviving tokens of each image; None where that is
    0.
    """
    if view.min_per_image == 0:
        return None
    image = view.of_token(view.layout.image)
    first = torch.zeros_like(view.slot_valid)
    count = torch.full((image.shape[0],), view.min_per_image, device=image.device)
    for number in range(max((len(grids) for grids in view.layout.grids), default=0)):
        members = view.slot_valid & (image == number)
        first |= top_k_mask(scores, members, count)
    return first


def grid_table(layout: Layout, values: Callable[[int, int], Tensor]) -> Tensor:
    """(B, V0) table over the layout's tokens of a (height * width,) value of each place in its
    grid.
    """
    table = torch.zeros(layout.valid.shape, dtype=torch.float32)
    for b, grids in enumerate(layout.grids):
        at = 0
        for grid in grids:
            table[b, at : at + grid.length] = values(grid.height, grid.width).repeat(grid.frames)
            at += grid.length
    return table.to(layout.valid.device)


def mask_rows(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """Rows of an attention mask: (B or 1, h, Q, K), rows (B, T) -> (B, h, T, K); None stays
    None.
    """
    if mask is None:
        return None
    batch, count = rows.shape
    _, heads, _, keys = mask.shape
    wide = mask.expand(batch, -1, -1, -1)
    return wide.gather(2, rows[:, None, :, None].expand(batch, heads, count, keys))
