"""What methods share: keeping the best by a score, minimum numbers, and the attention of rows."""

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
        per_frame: whether every frame of a video, and every image and tile, keeps the same share of
            its tokens. Otherwise all visual tokens of a sample compete for one budget.
    """

    per_frame: bool = False

    def best(self, view: View, scores: Tensor, counts: Tensor | None = None) -> Tensor:
        """Keep the best tokens like :func:`keep_best`, frame by frame if ``per_frame`` is set."""
        if not self.per_frame:
            return keep_best(view, scores, counts)
        frame, shares = frame_counts(view, view.counts_tensor() if counts is None else counts)
        keep = torch.zeros_like(view.slot_valid)
        for number in range(shares.shape[1]):
            keep |= top_k_mask(scores, view.slot_valid & (frame == number), shares[:, number])
        return keep


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError if an option is not one of the allowed words."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}.")


def keep_best(view: TokenView, scores: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return (B, V) bool, True for the tokens with the highest scores.

    The minimum number of tokens of each image is kept first.

    Args:
        view: what the method sees.
        scores: (B, V) scores; of equal scores the earlier token is kept.
        counts: (B,) int64, the number of tokens that each sample keeps; by default ``view.counts``.
    """
    first = best_of_each_image(view, scores)
    if first is not None:
        scores = scores.masked_fill(first, torch.inf)
    return top_k_mask(scores, view.slot_valid, view.counts_tensor() if counts is None else counts)


def frame_counts(view: TokenView, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the tokens that a sample keeps among its frames, in proportion to their sizes.

    An image or tile counts as one frame.

    Args:
        view: what the method sees.
        counts: (B,) int64, the number of tokens that each sample keeps.

    Returns:
        (B, V) int64, the number of each token's frame within its sample; (B, F) int64, the number
        of tokens that each frame keeps.
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
        images = even_counts(count, [sum(part) for part in parts], view.min_tokens_per_image)
        for at, part, own in zip(start, parts, images, strict=False):
            shares[b, at : at + len(part)] = torch.tensor(even_counts(own, part, 0))
    return frame, shares.to(device)


def minimum_counts(view: TokenView) -> Tensor:
    """Return (B,) int64: the number of visual tokens that each sample must keep."""
    images = torch.tensor(
        [len(grids) for grids in view.layout.grids], device=view.slot_valid.device
    )
    minimum = (images * view.min_tokens_per_image).clamp(min=view.min_tokens)
    return torch.minimum(minimum, view.slot_valid.sum(1))


def best_of_each_image(view: TokenView, scores: Tensor) -> Tensor | None:
    """Return (B, V) bool: the best ``min_tokens_per_image`` tokens of each image, or None if that
    is 0.
    """
    if view.min_tokens_per_image == 0:
        return None
    image = view.image
    first = torch.zeros_like(view.slot_valid)
    count = torch.full((image.shape[0],), view.min_tokens_per_image, device=image.device)
    for number in range(max((len(grids) for grids in view.layout.grids), default=0)):
        members = view.slot_valid & (image == number)
        first |= top_k_mask(scores, members, count)
    return first


def grid_table(layout: Layout, values: Callable[[int, int], Tensor]) -> Tensor:
    """Return (B, V0) float32: a value for each token of the layout from its place in its grid.

    Args:
        layout: the visual tokens before any pruning.
        values: a function from a grid's height and width to (height * width,) values.
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
    """Return (B, V) float32: the attention that some rows pay each visual token that is left.

    The mean is over the rows and, unless ``per_head`` (then (B, H, V)), over the heads.

    Args:
        view: what the method sees.
        rows: (B, T) int64, places among the layer's tokens, such as ``view.text`` or
            ``view.last[:, None]``.
        row_valid: (B, T) bool, False for rows that are left out.
        of: the attention of one layer from ``view.attention``, whose own ``text`` and ``last`` are
            then used as rows; by default the attention of the layer before.
        renormalise: make each row of each head sum to 1 over the visual tokens before averaging.
        per_head: do not average over heads.
    """
    of = view.previous_attention if of is None else of
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
