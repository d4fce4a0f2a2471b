"""VScan (Zhang et al., arXiv 2505.22654): a global and a local scan, then a middle decoder layer.

Before the decoder (§4.1) half of the tokens is chosen by a *local scan*: the picture is cut into
windows, and each gives those of its tokens that get most attention in a shallow block of the vision
tower. The other half is the *global scan*: what gets most attention in the block whose output the
model uses. Attention is the class token's, or of all tokens where there is none. Every other token
is merged into the most similar one that is kept, which becomes the mean of all that joined it.
Inside (§4.2), before a layer in the middle of the decoder, tokens are ranked by the attention of
the last token of the instruction.

The readings taken here: the sixth of CLIP's 24 blocks is a quarter of the depth, and its windows of
6 x 6 of 24 x 24 tokens are 4 x 4 windows of any picture. Windows give their best first, then their
second, and so on; where there are not enough tokens for all windows, the more attention a token
gets the sooner it is taken. Projected features are compared and merged, and the attention in the
decoder is that of the layer before. The paper lets three times as many tokens enter as are left
behind the middle layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from atp_patch.contract import Decision, DoorMethod, DoorView, View
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import nearest_target, ranked, top_k_mask
from atp_patch.methods.base import Ranking, attention_paid
from atp_patch.methods.images import Images

_SHALLOW = 0.25


@dataclass(frozen=True)
class VScanTower(DoorMethod):
    """The part of VScan that chooses and merges before the decoder.

    Attributes:
        local_share: the share of the entering tokens that the local scan chooses.
        windows: into how many windows along each side the local scan cuts a picture.
    """

    name: ClassVar[str] = "vscan-tower"
    summary: ClassVar[str] = "global and local scans of the tower's attention, the rest merged"

    local_share: float = 0.5
    windows: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local_share <= 1:
            raise ConfigError(f"local_share={self.local_share} must be from 0 to 1.")
        if self.windows < 1:
            raise ConfigError(f"windows={self.windows} must be at least 1.")

    @property
    def tower_blocks(self) -> tuple[float, ...]:
        """A shallow block, and the one whose output the model uses."""
        return (_SHALLOW, -1)

    def decide(self, view: DoorView) -> Decision:
        """Scan locally, then globally, and merge what is left."""
        images = Images.of(view)
        shallow, last = (view.tower[block].attention for block in self.tower_blocks)
        near = images.of_tokens(shallow)
        counts = images.tensor([int(self.local_share * count) for count in images.counts])
        local = ranked(images.valid, -self._turn(near, images, view), near) < counts[:, None]
        local = local & images.valid
        deep, others = images.of_tokens(last), images.valid & ~local
        keep = local | top_k_mask(deep, others, images.wanted - counts)
        joined = nearest_target(images.of_tokens(view.features), keep, images.valid)
        return Decision(
            images.to_tokens(keep),
            scores={"local": shallow, "global": last},
            recycled=images.merging(joined),
        )

    def _turn(self, attention: Tensor, images: Images, view: DoorView) -> Tensor:
        """Return (G, n) int64: how many tokens of the same window get more attention."""
        layout, sides = view.layout, self.windows
        sizes = [(grid.height, grid.width) for grids in layout.grids for grid in grids]
        height, width = (images.tensor(side)[:, None] for side in zip(*sizes, strict=True))
        frame, row, column = (
            images.of_tokens(view.of_token(table))
            for table in (layout.frame, layout.row, layout.column)
        )
        window = (frame * sides + row * sides // height) * sides + column * sides // width
        window = window.masked_fill(~images.valid, 0)
        number = sides**2 * max(grid.frames for grids in layout.grids for grid in grids)
        tokens = window.new_zeros(len(window), number)
        tokens.scatter_add_(1, window, images.valid.to(window.dtype))
        first = tokens.cumsum(1) - tokens  # the rank of each window's best token
        return ranked(images.valid, -window, attention) - first.gather(1, window)


@dataclass(frozen=True)
class VScan(Ranking):
    """Choose and merge before the decoder, and rank by the last token in its middle.

    Where the caller names no layers, tokens go before the middle one. With ``keep`` both parts keep
    that share of what reaches them.

    Attributes:
        share: the share of a sample's visual tokens that enter the decoder, or None if it follows
            from the budget.
        local_share: the share of the entering tokens that the local scan chooses.
        windows: into how many windows along each side the local scan cuts a picture.
    """

    name: ClassVar[str] = "vscan"
    summary: ClassVar[str] = "scans of the tower's attention, then the last token in the middle"
    depths: ClassVar[tuple[float, ...] | None] = (0.5,)

    share: float | None = None
    local_share: float = 0.5
    windows: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage_before()  # which checks its options

    def stage_before(self) -> DoorMethod:
        """Return the part that prunes before the decoder."""
        return VScanTower(self.share, self.local_share, self.windows)

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Rank the visual tokens by one row of the attention of the layer before."""
        row = view.last[:, None]
        scores = attention_paid(view, row, torch.ones_like(row, dtype=torch.bool))
        return Decision(self.best(view, scores), scores={"last": scores})
