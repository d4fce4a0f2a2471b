"""What methods share: the best by a score, minimums of samples and images, rows of a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from atp_patch.contract import Attention, LayerMethod, Layout, TokenView, View
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import cross_scores, even_counts, gather_heads, top_k_mask


@dataclass(frozen=True)
class Ranking(LayerMethod):
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


def keep_best(view: TokenView, scores: Tensor, counts: Tensor | None = None) -> Tensor:
    """(B, V) bool: the best so many by score; every image's best few come first.

    Args:
        scores: (B, V); higher is kept. Ties keep the earlier token.
        counts: (B,) int64; the view's by default.
    """
    first = best_of_each_image(view, scores)
    if first is not None:
        scores = scores.masked_fill(first, torch.inf)
    return top_k_mask(scores, view.slot_valid, view.counts_tensor() if counts is None else counts)


def frame_counts(view: TokenView, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V) int64 number of each token's frame within its sample, and (B, F) int64 how many tokens
    each frame keeps, in proportion to what it has; an image or tile is one frame.

    Args:
        counts: (B,) int64 tokens that each sample keeps.
    """
    grids, device = view.layout.grids, view.slot_valid.device
    starts = [[0, *accumulate(grid.frames for grid in sample)] for sample in grids]
    width, total = max(map(len, starts)), max(start[-1] for start in starts)
    first = torch.tensor([start + [0] * (width - len(start)) for start in starts], device=device)
    frame = first.gather(1, view.image) + view.of_token(view.layout.frame)
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


def least_counts(view: TokenView) -> Tensor:
    """(B,) int64: visual tokens that must stay, of those that are left."""
    images = torch.tensor(
        [len(grids) for grids in view.layout.grids], device=view.slot_valid.device
    )
    least = (images * view.min_per_image).clamp(min=view.min_tokens)
    return torch.minimum(least, view.slot_valid.sum(1))


def best_of_each_image(view: TokenView, scores: Tensor) -> Tensor | None:
    """(B, V) bool: the ``min_per_image`` best surviving tokens of each image; None where that is
    0.
    """
    if view.min_per_image == 0:
        return None
    image = view.image
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


def attention_paid(
    view: View,
    rows: Tensor,
    row_valid: Tensor,
    *,
    of: Attention | None = None,
    renormalise: bool = False,
    per_head: bool = False,
) -> Tensor:
    """(B, V) float32: the attention that some rows pay each visual token that is left.

    It is averaged over the rows and, unless ``per_head`` (then (B, H, V)), over the heads.

    Args:
        rows: (B, T) places among the layer's tokens, as ``view.text`` or ``view.last[:, None]``;
            ``row_valid`` (B, T) bool.
        of: of which layer, one of ``view.attention``, whose own ``text`` and ``last`` are then its
            rows; by default the layer before.
        renormalise: make each row of each head sum to 1 over the visual tokens before averaging.
    """
    of = view.before if of is None else of
    return cross_scores(
        gather_heads(of.query, rows),
        of.key,
        row_valid,
        of.slot + of.key_offset,
        view.slot_valid,
        of.scaling,
        mask=of.mask.rows(rows),
        softcap=of.softcap,
        sinks=of.sinks,
        renormalise=renormalise,
        per_head=per_head,
    )
