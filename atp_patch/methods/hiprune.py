"""HiPrune (Liu et al., arXiv 2508.00553): anchors, the tokens around them, and registers.

*Anchors* get most attention in a middle block of the vision tower, which looks at objects;
*buffers* are the four neighbours of each anchor in the picture; *registers* get most attention in
the block whose output the model uses, and fill the budget. A share alpha of the budget is for
anchors and buffers, and a fifth of that share is the number of anchors. Attention is what a token
gets from all tokens of the tower on average, its class token included.

The paper takes block 9 of CLIP's 24, and 16 of 32 for Qwen2.5-VL. The readings taken here: the
block is given as a share of the tower's depth, neighbours outside of the picture are left out, and
what they leave of the budget goes to registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atp_patch.contract import Decision, DoorMethod, DoorView
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import ranked, top_k_mask
from atp_patch.methods.images import Images


@dataclass(frozen=True)
class HiPrune(DoorMethod):
    """Keep what a middle block of the tower looks at, its neighbours, and what the last looks at.

    Attributes:
        alpha: the share of the kept tokens that is for anchors and buffers.
        object_depth: which block finds anchors, as a share of the tower's depth: 0.375 is the ninth
            of 24 blocks.
    """

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = (
        "what a middle block of the tower attends to, its neighbours, and the last"
    )
    reads_question: ClassVar[bool] = False

    alpha: float = 0.1
    object_depth: float = 0.375

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} must be from 0 to 1.")
        if not 0 < self.object_depth < 1:
            raise ConfigError(f"object_depth={self.object_depth} must be between 0 and 1.")

    @property
    def tower_blocks(self) -> tuple[float, ...]:
        """The block that finds anchors, and the one whose output the model uses."""
        return (self.object_depth, -1)

    @property
    def tower_queries(self) -> str:
        """All tokens, a class token too."""
        return "all"

    def decide(self, view: DoorView) -> Decision:
        """Choose anchors, then buffers, then registers."""
        images = Images.of(view)
        middle, last = (view.tower[block].attention for block in self.tower_blocks)
        objects, deep = images.of_tokens(middle), images.of_tokens(last)
        number = [round(self.alpha * count / 5) for count in images.counts]
        anchors = top_k_mask(objects, images.valid, images.tensor(number))
        buffers = _neighbours(anchors, images, view) & ~anchors
        # Buffers are taken by the attention of the middle block where there are too many of them.
        place = anchors * 2 + buffers * 1
        rank = ranked(images.valid, place, torch.where(place > 0, objects, deep))
        keep = (rank < images.wanted[:, None]) & images.valid
        return Decision(images.to_tokens(keep), scores={"objects": middle, "registers": last})


def _neighbours(chosen: Tensor, images: Images, view: DoorView) -> Tensor:
    """Return (G, n) bool: the tokens above, below, left and right of chosen ones in the same
    picture.
    """
    layout = view.layout
    row, column = (images.of_tokens(view.of_token(t)) for t in (layout.row, layout.column))
    sizes = [(grid.height, grid.width) for grids in layout.grids for grid in grids]
    height, width = (images.tensor(side)[:, None] for side in zip(*sizes, strict=True))
    place = torch.arange(chosen.shape[1], device=chosen.device)
    found = torch.zeros_like(chosen)
    for inside, step in (
        (column > 0, -1),
        (column < width - 1, 1),
        (row > 0, -width),
        (row < height - 1, width),
    ):
        beside = (place + step).clamp(0, chosen.shape[1] - 1).expand_as(chosen)
        found |= chosen.gather(1, beside) & inside
    return found & images.valid
