"""Plain data about the vision tower and about merging its tokens before the decoder.

A group is one image, tile or frame, within which the vision tower attends. Shapes: ``G`` groups,
``n`` tokens in the largest group, ``m`` tokens kept in the group that keeps most, ``d`` size of all
heads' keys together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Tower:
    """How a family's vision tower is built, and the names of its parts.

    Attributes:
        modules: names of the towers in the model without its head.
        blocks: name of the list of blocks in a tower.
        block: number of the block whose attention methods read.
        projector: name, in the model without its head, of the module that makes the decoder's
            tokens.
        attention: name of the attention module in a block.
        tokenwise: whether the projector works token by token. Then its inputs are merged, as in the
            paper; otherwise it joins patches, and its outputs are merged.
        class_token: whether the tower has a class token in front of each picture.
        class_last: whether the class token stands behind the picture instead.
        packed: whether all images are in one row of patches and the tower is given their grids or
            sizes.
        by_rows: whether the patches of a packed picture, or of one whose size the tower is told,
            lie row by row; otherwise they lie cell by cell.
        cell: number of patches along a side of the square that becomes one token of the decoder.
        cells: name of the keyword that tells a packed tower this number for each picture; empty
            where it is the same for all.
        joined: how many frames of a packed video, one after the other, become one frame of tokens
            behind the tower.
        window: number of tokens (of patches where these lie row by row) along a side of the windows
            into which a packed tower sorts them; 0 if it does not sort them.
        full_blocks: the numbers of the blocks that attend to whole pictures, where others attend
            within windows or not at all; empty where all blocks do.
        whole: whether every token of the projector has a placeholder, so that none is cut off
            after the projector.
        packers: the names of the methods of the model without its head that put the projector's
            features together, cut or shrink them.
        patch: number of pixels along a side of a patch.
        frames: number of pictures in one patch of a packed tower.
        square: whether grids must stay square.
        lead: for each module, the number of tokens in front of each grid that have placeholders too
            (class tokens).
        mergeable: whether methods may merge tokens, too. Where the features of a token are changed
            or used again behind the projector, methods may only read the tower.
        resized: name of the keyword that tells a tower that pictures have another size; empty if it
            needs none.
        sizes: name of the keyword that tells a tower the heights and widths of its pictures, or the
            column and row of each patch with -1 in padding; empty for towers that take squares or
            are given grids.
        sizes_step: how many of the units of these sizes a patch is long: its pixels, or 1 where
            they count patches.
    """

    modules: tuple[str, ...]
    blocks: str
    block: int
    projector: str
    attention: str = "self_attn"
    tokenwise: bool = True
    class_token: bool = False
    class_last: bool = False
    packed: bool = False
    by_rows: bool = False
    cell: int = 1
    cells: str = ""
    joined: int = 1
    window: int = 0
    full_blocks: tuple[int, ...] = ()
    whole: bool = True
    packers: tuple[str, ...] = ()
    patch: int = 0
    frames: int = 1
    square: bool = False
    lead: tuple[int, ...] = (0,)
    mergeable: bool = True
    resized: str = ""
    sizes: str = ""
    sizes_step: int = 1


@dataclass(frozen=True)
class TowerTokens:
    """The attention of one block of the vision tower, for the visual tokens in prompt order.

    ``B`` samples, ``V`` visual tokens (packed, padded to the longest sample), ``d`` size of all
    heads' keys together, ``Dt`` hidden size of the tower. All values are 0 in padding slots.

    Attributes:
        attention: (B, V) float32, the attention that each token receives within its image, tile or
            frame, averaged over heads. It is the attention of the class token or, in a tower
            without one or where the method asks for it (:attr:`DoorMethod.tower_queries`), the mean
            over all tokens of the tower. A token that is made of several patches has their sum.
        key: (B, V, d) float32, all heads' keys of each token; the mean over a token's patches.
            Where the host shrinks features by interpolation, all that is read of the tower is
            interpolated in the same way.
        class_token: (B, V, Dt) float32, the block's output at the class token of each token's
            image, tile or frame; None if the tower has none.
        states: (B, V, Dt) float32, the block's output at each token, where the method names a
            :class:`TextEncoder`; None otherwise.
    """

    attention: Tensor
    key: Tensor
    class_token: Tensor | None
    states: Tensor | None = None


class TextEncoder(NamedTuple):
    """The CLIP model whose text encoder tells what of a picture a question is about.

    Attributes:
        clip: path or Hub id of a CLIP model whose vision tower is that of the patched model.
        tokenizer: path or Hub id of the patched model's own tokenizer, which turns the ids of a
            prompt into words; None for the checkpoint that the model was loaded from.
    """

    clip: str
    tokenizer: str | None


class Quota(NamedTuple):
    """How many tokens a group keeps.

    Attributes:
        tokens: number of tokens that the group should keep.
        minimum: number of tokens that it must keep at least.
    """

    tokens: int
    minimum: int


@dataclass(frozen=True)
class TokenGroups:
    """What a tower method sees of the vision tower's tokens.

    Attributes:
        attention: (G, n) float32, the attention that each token receives in the tower, averaged
            over heads. It is the attention of the class token or, in a tower without one, the mean
            over all patches. A token that is made of several patches has their sum.
        key: (G, n, d), all heads' keys of each token; the mean over a token's patches.
        valid: (G, n) bool, False in padding slots.
        row, column: (G, n) int64, each token's place in its grid.
        heights, widths: number of rows and of columns of each group's grid.
        counts: for each group, the number of tokens to keep; None if the method decides it.
        minimum: number of tokens that every group must keep at least, or its number in ``counts``
            where that is smaller.
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
    """Which tokens of each group are kept, and what is merged into each of them.

    Attributes:
        keep: (G, n) bool, True for tokens that are kept. Values in padding slots are ignored.
        index: (G, m) int64, the columns of the kept tokens in order; 0 in unused slots.
        weight: (G, m, n) float32, the weight of each token of the group in the feature of each kept
            token.
        changed: (G, m) bool, True where the feature of a kept token is replaced by that weighted
            sum, False where it stays unchanged and in unused slots.
    """

    keep: Tensor
    index: Tensor
    weight: Tensor
    changed: Tensor
