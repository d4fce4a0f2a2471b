"""VisPruner (Zhang et al., arXiv 2412.01818, later version): important tokens, and distinct ones.

The *important* tokens, half of the budget, get most attention in the vision tower: from the class
token where there is one, else from all tokens on average (§3.2). Of the others near-duplicates go
step by step, until the other half of the budget is left (§3.3): the tokens that are left are dealt
into two halves by turns, each token of the first half looks for the most similar one of the second,
and those of the largest similarity go.

The readings taken here: tokens alternate in the order of their attention, similarity is the cosine
of projected features, and a step takes 8 of 576 tokens, in proportion where an image has more or
fewer. A class token has no place among the decoder's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atp_patch.contract import Decision, DoorMethod, DoorView
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import (
    cosine_similarities,
    descending_rank,
    top_k_mask,
    without_duplicates,
)
from atp_patch.methods.images import Images

_TOKENS_TO_A_STEP = 72


@dataclass(frozen=True)
class VisPruner(DoorMethod):
    """Keep what the tower attends to, and of the rest what is not like anything else.

    Attributes:
        important_share: the share of the kept tokens that is chosen by attention.
    """

    name: ClassVar[str] = "vispruner"
    summary: ClassVar[str] = "the tower's attention, and of the rest no near-duplicates"
    reads_question: ClassVar[bool] = False

    important_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important_share <= 1:
            raise ConfigError(f"important_share={self.important_share} must be from 0 to 1.")

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        """The block whose output the model uses."""
        return (-1,)

    def decide(self, view: DoorView) -> Decision:
        """Choose important tokens, then leave out what repeats others."""
        images, seen = Images.of(view), view.tower[-1]
        attention = images.of_tokens(seen.attention)
        first = [int(self.important_share * count) for count in images.counts]
        important = top_k_mask(attention, images.valid, images.tensor(first))
        sizes = images.valid.sum(1).tolist()
        distinct = without_duplicates(
            cosine_similarities(images.of_tokens(view.features), images.valid),
            descending_rank(attention, images.valid),
            images.valid & ~important,
            [count - part for count, part in zip(images.counts, first, strict=True)],
            [max(round(size / _TOKENS_TO_A_STEP), 1) for size in sizes],
        )
        keep = images.to_tokens(important | distinct)
        return Decision(keep, scores={"attention": seen.attention})
