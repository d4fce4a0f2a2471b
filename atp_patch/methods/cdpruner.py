"""CDPruner (Zhang et al., 2025, arXiv 2506.10967): diverse tokens, given the question.

A determinantal point process over the visual tokens, conditioned on the question: its kernel is
``diag(r) S diag(r)``, with the cosine similarities ``S`` of the projected features and the
relevance ``r`` of each token to the question, scaled to [0, 1] within each image. The subset is
found by greedy maximum-a-posteriori inference (Chen et al., 2018).

By default the relevance is the cosine of a token's feature with the language model's embeddings of
the question's words, averaged over the words. With ``clip`` it is that of the vision tower's token
with the whole question in CLIP's shared space, as in the paper for LLaVA, multiplied by -1: the
patches that show what a text names are less like it in CLIP's space than the others are, and the
authors' program multiplies by -1 too. The question is the text behind the first visual token, or
all text where none stands behind it. Where all tokens are equally relevant, or there is no text,
diversity alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from atp_patch.contract import Decision, DoorMethod, DoorView, TextEncoder
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import cosine_similarities, determinantal_selection
from atp_patch.methods.images import Images


@dataclass(frozen=True)
class CDPruner(DoorMethod):
    """Keep tokens that differ from each other and matter to the question.

    Attributes:
        clip: path or Hub id of the CLIP model whose vision tower the patched model has. Its text
            encoder then tells what is relevant; by default the language model's embeddings do.
        tokenizer: with ``clip``, path or Hub id of the patched model's tokenizer; by default that
            of the checkpoint that the model was loaded from.
    """

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "features that differ from each other and are like the question"

    clip: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None and self.clip is None:
            raise ConfigError("tokenizer= reads the question for CLIP; give clip= too.")

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        """The block whose output the model uses, if CLIP says what is relevant."""
        return () if self.clip is None else (-1,)

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The CLIP model, or None where the language model's embeddings serve."""
        return None if self.clip is None else TextEncoder(self.clip, self.tokenizer)

    def decide(self, view: DoorView) -> Decision:
        """Add the token that makes the determinant of the kernel largest, image by image."""
        images = Images.of(view)
        relevance = relevance_to_words(view) if view.relevance is None else -view.relevance
        features = images.of_tokens(view.features)
        similarity = cosine_similarities(features, images.valid, rounded=False)
        quality = scaled(images.of_tokens(relevance), images.valid)
        keep = determinantal_selection(similarity, quality, images.valid, images.wanted)
        return Decision(images.to_tokens(keep), scores={"relevance": relevance})


def relevance_to_words(view: DoorView) -> Tensor:
    """Return (B, V) float32: the mean cosine of each visual feature with the words of the
    question.
    """
    words = view.question
    # The mean of cosines is the product with the mean of unit vectors.
    question = normalize(view.text.float(), dim=-1).masked_fill(~words[..., None], 0.0).sum(1)
    question = question / words.sum(1, keepdim=True).clamp(min=1)
    return (normalize(view.features.float(), dim=-1) @ question[..., None])[..., 0]


def scaled(scores: Tensor, valid: Tensor) -> Tensor:
    """Return (G, n): scores scaled to [0, 1] within each row; 1 where all are equal."""
    smallest = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    largest = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    spread = largest - smallest
    equal = spread <= 1e-6 * largest.abs().clamp(min=1)
    return torch.where(equal, 1.0, (scores - smallest) / spread).masked_fill(~valid, 0.0)
