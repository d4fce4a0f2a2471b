"""Positions of tokens of pictures that have become fewer.

What stays keeps the position that it has without pruning, and so does the text. vLLM numbers the
tokens of a prompt one after the other, except in models with M-RoPE, which it asks for three
positions of each token and for the distance between the next position and the next number. All
that is known before the picture is looked at goes there: the text, and the first position of each
picture. How far a token stands from there is known when it has been chosen. It travels with its
feature, in further channels, which are split off before the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

AXES = 3  # of M-RoPE's positions: time, row, column
CHANNELS = 2 * AXES
_BASE = 256  # whole numbers up to it are exact in bfloat16


def with_steps(features: Tensor, steps: Tensor) -> Tensor:
    """(m, D + CHANNELS): features with each token's distance from its picture's first position.

    Args:
        features: (m, D), of any floating point dtype.
        steps: (m, AXES) int64 from 0 to 65535.
    """
    digits = torch.cat([steps // _BASE, steps % _BASE], dim=1)
    return torch.cat([features, digits.to(features)], dim=1)


def split_steps(features: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`with_steps` joined: (m, D) features and (m, AXES) int64 distances."""
    digits = features[:, -CHANNELS:].long()
    return features[:, :-CHANNELS], digits[:, :AXES] * _BASE + digits[:, AXES:]


def prompt_positions(length: int, pictures: Iterable[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """The positions of a prompt's tokens, those of a picture all being its first.

    Args:
        length: the number of tokens of the prompt.
        pictures: for each picture in order, the number of its first token, how many tokens stay of
            it, and how many positions it takes.

    Returns:
        (AXES, length) int64, and the next position less ``length``.

    >>> prompt_positions(6, [(1, 2, 9)])[0][0].tolist()
    [0, 1, 1, 10, 11, 12]
    """
    position = torch.arange(length)
    shift = 0
    for start, tokens, extent in pictures:
        position[start : start + tokens] = start + shift
        shift += extent - tokens
        position[start + tokens :] = torch.arange(start + tokens, length) + shift
    return position.expand(AXES, -1).contiguous(), shift
