"""VoCo-LLaMA (Ye et al., 2024, arXiv 2406.12275): an image as keys and values of learned tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from atp_patch.contract import Method
from atp_patch.contract.errors import ConfigError

_MOST = 65_536  # the most VoCo tokens of a segment, far more than any image has tokens


class VoCoTokens(nn.Module):
    """The learned input embeddings of the VoCo tokens.

    Attributes:
        embedding: (V, D) parameter, one embedding for each VoCo token.
    """

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, hidden_size) * 0.02)


@dataclass(frozen=True)
class VoCo(Method):
    """VoCo-LLaMA: text sees only a few learned tokens of each image, and the image is then dropped.

    Attributes:
        num_tokens: number of VoCo tokens of each segment, ``V``. A segment is a run of visual
            tokens without text between them: an image with all its tiles, or a video. If a model
            puts text tokens inside an image, a segment is a tile (Idefics 3, SmolVLM) or a row
            (Mistral 3, Pixtral).
        segment_frames: number of frames of a video in a segment; None means all of them.
    """

    name: ClassVar[str] = "voco"
    where: ClassVar[str] = "voco"
    summary: ClassVar[str] = "each image compressed into a few learned tokens (VoCo-LLaMA)"

    num_tokens: int = 1
    segment_frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_tokens <= _MOST:
            raise ConfigError(
                f"num_tokens={self.num_tokens}: at least one VoCo token is needed, and at most "
                f"{_MOST} are made."
            )
        if self.segment_frames is not None and self.segment_frames < 1:
            raise ConfigError(f"segment_frames={self.segment_frames} must be at least 1, or None.")

    @property
    def needs_budget(self) -> bool:
        """False: ``num_tokens`` says how many tokens are left."""
        return False

    @property
    def takes_budget(self) -> bool:
        """False: ``num_tokens`` says how many tokens are left."""
        return False

    def build(self, hidden_size: int) -> nn.Module:
        """Make the module that holds the VoCo tokens' embeddings."""
        return VoCoTokens(self.num_tokens, hidden_size)
