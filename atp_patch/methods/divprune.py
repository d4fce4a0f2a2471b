"""DivPrune (Alvar et al., 2025, arXiv 2503.02175): the tokens that differ most from each other.

Token pruning as a max-min diversity problem (eq. 3), solved greedily (algorithm 1) with cosine
distances (eq. 4) between the projected features. The paper treats all visual tokens of a prompt as
one set; here each image chooses among its own tokens, and a video is one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atp_patch.contract import Decision, DoorMethod, DoorView
from atp_patch.maths import cosine_similarities, max_min_selection
from atp_patch.methods.images import Images


@dataclass(frozen=True)
class DivPrune(DoorMethod):
    """Keep the tokens whose smallest distance to each other is large."""

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "the visual features that differ most from each other"
    reads_question: ClassVar[bool] = False

    def decide(self, view: DoorView) -> Decision:
        """Add the token that is farthest from those chosen so far, image by image."""
        images = Images.of(view)
        similarity = cosine_similarities(images.of_tokens(view.features), images.valid)
        keep = max_min_selection(similarity, images.valid, images.wanted)
        return Decision(images.to_tokens(keep))
