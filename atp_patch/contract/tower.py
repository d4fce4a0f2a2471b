"""Plain data about pruning before the decoder: the tower, its tokens in groups, what they become.

A group is one image, tile or frame: what the vision tower attends within. Shapes: ``G`` groups,
``n`` tokens of the largest, ``m`` tokens kept of the group that keeps most, ``d`` size of all
heads' keys together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Tower:
    """Where a family's vision tower keeps what pruning before the decoder needs.

    Attributes:
        modules: names of the towers in the model without its head.
        blocks: name of the list of blocks in a tower; ``attention``: of the attention in a block.
        block: number of the block whose attention counts.
        projector: name, in the model without its head, of what makes the decoder's tokens.
        tokenwise: the projector works token by token, so its inputs can be merged, as in the paper;
            else it joins patches, and its outputs are merged.
        class_token: the first token of the tower is a class token.
        packed: all images stand in one row of patches, and the tower is told their grids.
        cell: patches along a side of what becomes one token of the decoder.
        window: packed: tokens along a side of the windows by which the tower sorts them, 0: none.
        whole: every token of the projector has a placeholder (nothing is cut off after it).
        patch: pixels along a side of a patch; ``frames``: packed: pictures in one patch.
        square: grids must stay square.
        lead: of each module, tokens in front of each grid that get placeholders too (class tokens).
        resized: keyword by which a tower is told that pictures have another size, if it must be.
    """

    modules: tuple[str, ...]
    blocks: str
    block: int
    projector: str
    attention: str = "self_attn"
    tokenwise: bool = True
    class_token: bool = False
    packed: bool = False
    cell: int = 1
    window: int = 0
    whole: bool = True
    patch: int = 0
    frames: int = 1
    square: bool = False
    lead: tuple[int, ...] = (0,)
    resized: str = ""


@dataclass(frozen=True)
class TowerTokens:
    """What one block of the vision tower made of the visual tokens, in their places in the prompt.

    ``B`` samples, ``V`` visual tokens (packed, padded to the longest sample), ``d`` size of all
    heads' keys together, ``Dt`` hidden size of the tower. All of it is 0 in padding slots.

    Attributes:
        attention: (B, V) float32, the attention that each token gets within its image, tile or
            frame, averaged over heads: that of the class token, or of all patches on average where
            the tower has none. Of several patches that become one token it is the sum.
        key: (B, V, d) float32, all heads' keys of each token; the mean of several patches.
        class_token: (B, V, Dt) float32, what the block made of the class token of each token's
            image, tile or frame; None where the tower has none.
    """

    attention: Tensor
    key: Tensor
    class_token: Tensor | None


class Quota(NamedTuple):
    """Tokens that a group is to keep, and those that it keeps at least."""

    tokens: int
    least: int


@dataclass(frozen=True)
class TokenGroups:
    """What a method sees of the tokens that the decoder would get.

    Attributes:
        attention: (G, n) float32, the attention that each token gets in the tower, averaged over
            heads: of the class token, or of all patches on average where there is none. Of several
            patches that become one token it is the sum.
        key: (G, n, d), all heads' keys of one token; the mean of several patches.
        valid: (G, n) bool, False in padding slots.
        row, column: (G, n) int64 places in the grid; ``heights``, ``widths`` of the grids.
        counts: tokens to keep of each group; None: the method decides.
        minimum: tokens that every group keeps at least.
    """

    attention: Tensor
    key: Tensor
    valid: Tensor
    row: Tensor
    column: Tensor
    heights: Sequence[int]
    widths: Sequence[int]
    counts: tuple[int, ...] | None
    minimum: int = 1


@dataclass(frozen=True)
class Merge:
    """What becomes of the groups' tokens.

    Attributes:
        keep: (G, n) bool.
        index: (G, m) int64, the kept tokens in order, and 0 in unused slots.
        weight: (G, m, n) float32: a kept token's feature is this sum over its group's features.
        changed: (G, m) bool, False where the feature stays as it is.
    """

    keep: Tensor
    index: Tensor
    weight: Tensor
    changed: Tensor
