"""FasterVLM (Zhang et al., 2024, arXiv 2412.01818v1): what the tower's class token attends to.

The method ranks the image tokens by the attention that the class token pays them in the vision
encoder, averaged over heads, and keeps the first. Taken here is the layer whose output the model
uses (for LLaVA the last but one). In a tower without a class token, which the paper does not treat,
the score is the attention that a token gets from all tokens on average. The attention is normalised
over the image's tokens alone. Each image keeps its share of the sample's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atp_patch.contract import Decision, DoorMethod, DoorView
from atp_patch.maths import top_k_mask
from atp_patch.methods.images import Images


@dataclass(frozen=True)
class FasterVLM(DoorMethod):
    """Keep the tokens that get most attention in the vision tower."""

    name: ClassVar[str] = "fastervlm"
    summary: ClassVar[str] = "the largest attention of the vision tower's class token"
    reads_question: ClassVar[bool] = False

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        """The block whose output the model uses."""
        return (-1,)

    def decide(self, view: DoorView) -> Decision:
        """Keep the best of each image."""
        attention, images = view.tower[-1].attention, Images.of(view)
        keep = top_k_mask(images.of_tokens(attention), images.valid, images.wanted)
        return Decision(images.to_tokens(keep), scores={"attention": attention})
