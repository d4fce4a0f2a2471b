"""A prompt on the CPU: its runs of placeholders, the text rows that count, its last token.

All of this is done on the CPU from one copy of the ids, before the decoder begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from atp_patch.contract import Span
from atp_patch.maths import pack


@dataclass(frozen=True)
class Prompt:
    """The tokens of one forward pass, on the CPU.

    Attributes:
        visual: (B, L) bool, every attended placeholder of an image or video, in a grid or not.
        attended: (B, L) bool, False at padding.
        ids: (B, L) int64, or None where only embeddings were given.
        scored: (B, L) bool, the tokens that a prompt at inference holds too: those before the
            answer that is learned, and none that was generated.
        finite: (B, L) bool, False where the embedding holds NaN or infinity.
        hidden: (B, L) bool, placeholders of images or videos that the attention mask hides.
    """

    visual: Tensor
    attended: Tensor
    ids: Tensor | None
    scored: Tensor
    finite: Tensor
    hidden: Tensor

    @property
    def token_counts(self) -> list[int]:
        """How many tokens each sample has without padding."""
        return self.attended.sum(1).tolist()

    def spans(self) -> list[list[Span]]:
        """Return the runs of placeholders of each sample."""
        ids = torch.zeros_like(self.visual, dtype=torch.long) if self.ids is None else self.ids
        # A run ends where the id changes; -1 is the id of everything that is no placeholder.
        marked = torch.where(self.visual & self.attended, ids, -1)
        found: list[list[Span]] = []
        for row in marked:
            edges = torch.nonzero(row[1:] != row[:-1]).flatten() + 1
            bounds = [0, *edges.tolist(), row.shape[0]]
            runs = pairwise(bounds)
            found.append([Span(a, b, int(row[a])) for a, b in runs if a < b and row[a] >= 0])
        return found

    def cut(self) -> tuple[int, int] | None:
        """Return (sample, position) where a run of placeholders is hidden in part, or None where
        none is.
        """
        placeholder = self.visual | self.hidden
        both = placeholder[:, 1:] & placeholder[:, :-1]
        positions = torch.nonzero(both & (self.hidden[:, 1:] != self.hidden[:, :-1]))
        return (int(positions[0, 0]), int(positions[0, 1])) if len(positions) else None

    def text(self) -> Tensor:
        """Return (B, L) bool: the text that scores visual tokens, which stands behind the first
        one.
        """
        after_first = self.visual.cumsum(1) > 0
        return self.attended & self.scored & ~self.visual & after_first


@dataclass(frozen=True)
class TextRows:
    """The text rows that count, packed, on the decoder's device.

    Attributes:
        position, valid: (B, T) int64 positions in the sequence, and bool, True in slots that are
            used.
        last: (B,) int64, the position of the last prompt token.
        sample_key: (B,) int64, the same for the same text, whatever the padding and the batch.
    """

    position: Tensor
    valid: Tensor
    last: Tensor
    sample_key: Tensor

    @classmethod
    def of(cls, prompt: Prompt, device: torch.device) -> TextRows:
        """Pack the text rows of a prompt and move them to ``device``."""
        text = prompt.text()
        position, valid = pack(text)
        positions = torch.arange(text.shape[1])
        prompt_token = prompt.attended & prompt.scored
        last = torch.where(prompt_token, positions, -1).amax(1).clamp(min=0)
        key = torch.zeros(text.shape[0], dtype=torch.long)
        if prompt.ids is not None:
            # This is a hash over the text ids, each weighed by its number among the text rows.
            order = (text.cumsum(1) * 0x9E3779B1) % 0x7FFFFFFF
            key = ((prompt.ids + 1) * order * text).sum(1) % 0x7FFFFFFF
        return cls(position.to(device), valid.to(device), last.to(device), key.to(device))

    def to(self, device: torch.device) -> TextRows:
        """Return the same rows on another device."""
        tensors = (self.position, self.valid, self.last, self.sample_key)
        return TextRows(*(t.to(device) for t in tensors))
