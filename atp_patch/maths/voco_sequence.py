"""VoCo-LLaMA's sequence: VoCo tokens behind each image, and which token may attend to which.

Shapes: ``B`` batch, ``L`` tokens that were given, ``n`` columns once the VoCo tokens stand
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VoCoSequence:
    """A sequence with VoCo tokens in it.

    Attributes:
        place: (B, n) int64, the position of the given token that each column stands for. VoCo
            tokens stand for the last visual tokens of their segment.
        voco: (B, n) int64, the number of the VoCo token in a column; -1 where a column holds a
            given token.
        segment: (B, n) int64, the number of the segment of visual and VoCo tokens; -1 for text.
        valid: (B, n) bool, False in the columns at the end of a shorter sample.
    """

    place: Tensor
    voco: Tensor
    segment: Tensor
    valid: Tensor

    @property
    def visual(self) -> Tensor:
        """(B, n) bool: the columns that hold visual tokens."""
        return (self.segment >= 0) & (self.voco < 0)

    def to(self, device: torch.device) -> VoCoSequence:
        """Return the same sequence on another device."""
        return VoCoSequence(
            *(t.to(device) for t in (self.place, self.voco, self.segment, self.valid))
        )


def insert_voco_tokens(
    segments: Sequence[Sequence[tuple[int, int]]], length: int, num_tokens: int
) -> VoCoSequence:
    """Put ``num_tokens`` VoCo tokens behind each segment.

    Args:
        segments: for each sample the (first, one behind the last) position of each segment of
            visual tokens, in order; no segment has fewer than ``num_tokens``.
        length: ``L``, how many tokens of each sample were given.
        num_tokens: how many VoCo tokens stand behind a segment.
    """
    rows = []
    for sample in segments:
        parts = []
        at = 0
        for number, (start, stop) in enumerate(sample):
            parts += [
                _part(at, start, -1, given=True),
                _part(start, stop, number, given=True),
                _part(stop - num_tokens, stop, number, given=False),
            ]
            at = stop
        rows.append(torch.cat([*parts, _part(at, length, -1, given=True)], dim=1))
    longest = max(row.shape[1] for row in rows)
    table = torch.tensor([0, -1, -1])[:, None, None].repeat(1, len(rows), longest)
    valid = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        table[:, b, : row.shape[1]] = row
        valid[b, : row.shape[1]] = True
    place, voco, segment = table
    return VoCoSequence(place, voco, segment, valid)


def _part(start: int, stop: int, segment: int, *, given: bool) -> Tensor:
    """Return (3, stop - start) int64: place, voco and segment of tokens that follow each other."""
    place = torch.arange(start, stop)
    voco = torch.full_like(place, -1) if given else place - start
    return torch.stack([place, voco, torch.full_like(place, segment)])


def voco_visible(sequence: VoCoSequence, attended: Tensor) -> Tensor:
    """Return the attention mask of VoCo-LLaMA, with a row for each query and a column for each key.

    It is causal, and visual tokens are visible only to the visual and VoCo tokens of their own
    segment. Everything else about an image passes through its VoCo tokens, which all later tokens
    see. Each token sees itself, so that no row is empty, not even of padding.

    Args:
        sequence: the sequence.
        attended: (B, n) bool, False at padding.

    Returns:
        (B, n, n) bool, True where the query may see the key.
    """
    n = sequence.place.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=attended.device).tril()
    same = sequence.segment[:, :, None] == sequence.segment[:, None, :]
    allowed = (same | ~sequence.visual[:, None, :]) & attended[:, None, :]
    return causal & (allowed | torch.eye(n, dtype=torch.bool, device=attended.device))


def output_columns(sequence: VoCoSequence, length: int) -> Tensor:
    """Return, as (B, L) int64, the column whose output is that of each given token.

    The outputs of a segment's last visual tokens are those of its VoCo tokens, so that the text
    behind an image is predicted from VoCo tokens alone.
    """
    batch, n = sequence.place.shape
    number = torch.arange(n, device=sequence.place.device).expand(batch, -1)
    public = torch.zeros(batch, length + 1, dtype=torch.long, device=sequence.place.device)
    for written in (sequence.valid & (sequence.voco < 0), sequence.voco >= 0):
        public.scatter_(1, torch.where(written, sequence.place, length), number)
    return public[:, :length]
