"""VisionZip (Yang et al., 2024, arXiv 2412.04467): dominant tokens, and the others merged.

The *dominant* tokens are those that get most attention in the vision tower: from the class token
where there is one, else from all tokens on average. The *contextual* tokens are made of the others:
every r-th of them, evenly in sequence, is a target; each other one joins the target with the most
similar key; a target becomes the mean of itself and those that joined it. The paper's budgets of
64, 128 and 192 tokens have 54, 108 and 162 dominant ones; that share is kept for every budget. The
readings taken here: keys are compared by the cosine over all heads, and the projected features are
merged, where the paper merges before the projector. The class token, which the paper adds to the
dominant ones, has no place among the decoder's tokens and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atp_patch.contract import Decision, DoorMethod, DoorView
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import even_targets, nearest_target, top_k_mask
from atp_patch.methods.images import Images


@dataclass(frozen=True)
class VisionZip(DoorMethod):
    """Keep dominant tokens, and merge the others into contextual ones.

    Attributes:
        dominant_share: the share of the kept tokens that are dominant; 1 merges nothing.
    """

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "the tower's attention, and the rest merged into an even few"
    reads_question: ClassVar[bool] = False

    dominant_share: float = 27 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dominant_share <= 1:
            raise ConfigError(f"dominant_share={self.dominant_share} must be from 0 to 1.")

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        """The block whose output the model uses."""
        return (-1,)

    def decide(self, view: DoorView) -> Decision:
        """Choose dominant tokens and targets, and say which tokens join which target."""
        images, seen = Images.of(view), view.tower[-1]
        dominant_counts = [round(self.dominant_share * count) for count in images.counts]
        attention = images.of_tokens(seen.attention)
        dominant = top_k_mask(attention, images.valid, images.tensor(dominant_counts))
        others = images.valid & ~dominant
        target = even_targets(others, images.wanted - images.tensor(dominant_counts))
        keep = images.to_tokens(dominant | target)
        scores = {"attention": seen.attention}
        if list(images.counts) == dominant_counts:
            return Decision(keep, scores=scores)
        joined = nearest_target(images.of_tokens(seen.key), target, others)
        return Decision(keep, scores=scores, recycled=images.merging(joined))
