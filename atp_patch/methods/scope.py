"""SCOPE (Deng et al., 2025, arXiv 2510.24214): tokens that are salient and cover the picture.

The coverage of a set is the sum, over all tokens, of the cosine similarity to the nearest member.
Each step adds the token with the largest gain of coverage times its saliency to the power of
``alpha``, which the authors' scripts set to 1. Saliency is the attention of the class token in the
vision tower. The readings taken here: similarities are those of the projected features (the paper
has those of the tower's), a similarity below 0 covers nothing, the attention is that of the layer
whose output the model uses, and in a tower without a class token it is the attention that a token
gets from all tokens on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from atp_patch.contract import Decision, DoorMethod, DoorView
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import cosine_similarities, coverage_selection
from atp_patch.methods.images import Images


@dataclass(frozen=True)
class SCOPE(DoorMethod):
    """Keep the tokens that cover the others best, weighed by the attention that they get.

    Attributes:
        alpha: the power of the attention. With 0 coverage alone counts, and the vision tower is not
            read, so that the method works on every family.
    """

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "features that cover the others, weighed by the tower's attention"
    reads_question: ClassVar[bool] = False

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ConfigError(f"alpha={self.alpha} must be at least 0; 0 ignores the attention.")

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        """The block whose output the model uses, or none if attention does not count."""
        return (-1,) if self.alpha else ()

    def decide(self, view: DoorView) -> Decision:
        """Add the token with the largest weighed gain of coverage, image by image."""
        images, scores = Images.of(view), {}
        weight = torch.ones_like(images.valid, dtype=torch.float32)
        if self.alpha:
            scores["attention"] = view.tower[-1].attention
            weight = images.of_tokens(view.tower[-1].attention) ** self.alpha
        similarity = cosine_similarities(images.of_tokens(view.features), images.valid)
        keep = coverage_selection(similarity, weight, images.valid, images.wanted)
        return Decision(images.to_tokens(keep), scores=scores)
