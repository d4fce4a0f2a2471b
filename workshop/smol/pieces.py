"""The tokens of SmolLM2 that the words of pictures consist of.

The tower learns which token each part of a written word belongs to. Its output is compared with the
decoder's own embeddings, so that the decoder can read it from the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp_patch.builtin.documents.words import COLUMNS, ICONS, NAMES, PLACES, SERIES, WORDS
from atp_patch.builtin.smol.tokens import IMAGE_PAD
from atp_patch.builtin.vocabulary import CHARACTERS, OBJECT_COLOURS, SHAPES

BLANK = 0
"""Piece of a place where nothing is written."""
UNKNOWN = -100
"""Piece of a token that is none of the candidates; losses ignore it."""


def every_word() -> tuple[str, ...]:
    """Return every text that can stand in a picture, and the names of colours and shapes."""
    titles = tuple(word.capitalize() for word in WORDS)
    numbers = tuple(str(number) for number in range(10))
    named = (*OBJECT_COLOURS, *SHAPES)
    return (
        *WORDS,
        *titles,
        *ICONS,
        *NAMES,
        *PLACES,
        *COLUMNS,
        *SERIES,
        *numbers,
        *CHARACTERS,
        *named,
    )


@dataclass
class Pieces:
    """The candidates for a token, and the tokens of each text.

    Attributes:
        tokenizer: the decoder's tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    _of: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the candidates from the second one on; the first one is BLANK."""
        found = (self.tokenizer(f" {word}")["input_ids"] for word in (*every_word(), ""))
        return tuple(sorted({int(token) for tokens in found for token in tokens}))

    @cached_property
    def number(self) -> dict[int, int]:
        """Number of each candidate by its token id."""
        return {token: 1 + place for place, token in enumerate(self.ids)}

    @cached_property
    def space(self) -> int:
        """Number of the candidate that is a space alone."""
        return self.number[int(self.tokenizer(" ")["input_ids"][0])]

    @property
    def image_pad(self) -> int:
        """Token id of the placeholder of a visual token."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_PAD))

    def of(self, text: str) -> NDArray[np.int64]:
        """(characters,) int64, the number of the token that each character belongs to."""
        if text not in self._of:
            read = self.tokenizer(f" {text}", return_offsets_mapping=True)
            numbers = np.full(len(text), UNKNOWN, dtype=np.int64)
            spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
            for token, (start, end) in spans:
                numbers[max(start - 1, 0) : end - 1] = self.number.get(token, UNKNOWN)
            self._of[text] = numbers
        return self._of[text]


SLOT_WEIGHTS = (0.4, 0.25, 0.22, 0.13)
"""Share of each of the 2 x 2 patches in a visual token's ideal embedding.

They differ, so that the decoder can tell the order of two pieces in one token, such as two digits.
"""


def by_token(pieces: Tensor, rows: int, columns: int) -> Tensor:
    """(pictures, tokens, 4): the pieces of the 2 x 2 patches of each visual token.

    Args:
        pieces: (pictures, rows * columns) in raster order.
        rows, columns: number of rows and columns of patches.
    """
    cut = pieces.unflatten(1, (rows // 2, 2, columns // 2, 2))
    return cut.transpose(2, 3).flatten(1, 2).flatten(2)


def ideal_tokens(pieces: Tensor, embeddings: Tensor, space: int) -> Tensor:
    """(pictures, tokens, hidden) float32: visual tokens that the decoder reads as what they show.

    Args:
        pieces: (pictures, tokens, 4), from `by_token`. Blank and unknown ones do not count.
        embeddings: (candidates, hidden), the decoder's embeddings of the candidates.
        space: number of the candidate that stands for a token where nothing is shown.
    """
    shown = pieces > BLANK
    shown_any = shown.any(-1, keepdim=True)
    numbers = torch.where(shown, pieces, space) - 1
    weights = torch.tensor(SLOT_WEIGHTS) * torch.where(shown_any, shown, True)
    weights = weights / weights.sum(-1, keepdim=True)
    return (embeddings.float()[numbers] * weights[..., None]).sum(-2)
