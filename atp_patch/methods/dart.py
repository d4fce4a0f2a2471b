"""DART (Wen et al., arXiv 2502.11494): a few pivots, and the tokens that duplicate them least.

Pivots are the visual and the text tokens with the largest L1 norm of their keys (§3.3 compares
choices and finds them alike; this is the one of the main results). Each pivot in turn keeps the
tokens of the smallest cosine similarity to it among those that are left, and all pivots keep the
same number. The keys are those of the layer before, all heads together; similarity is that of the
hidden states that enter the layer.

Three points are readings. Keys are taken without rotary embedding, under which an L1 norm would
depend on the place of the token. Visual pivots count among the kept tokens, and where the number of
the others is not a multiple of the number of pivots, the first pivots keep one more, so that the
budget is met exactly. Visual pivots come before those of the text, and pivots of a larger norm
before those of a smaller. Of equal tokens the earlier is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from atp_patch.contract import Decision, LayerMethod, View
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import descending_rank, gather_heads, gather_tokens, top_k_mask
from atp_patch.methods.base import keep_best


@dataclass(frozen=True)
class DART(LayerMethod):
    """Keep pivots by the norm of their keys, and for each pivot the tokens that are least like it.

    The paper's setting is ``layers=[2]``.

    Attributes:
        visual_pivots: how many pivots are visual tokens.
        text_pivots: how many pivots are text tokens.
    """

    name: ClassVar[str] = "dart"
    summary: ClassVar[str] = "pivots by key norm, and the tokens that are least like them"

    visual_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visual_pivots < 1 or self.text_pivots < 0:
            raise ConfigError(
                f"visual_pivots={self.visual_pivots} must be at least 1, and "
                f"text_pivots={self.text_pivots} at least 0."
            )

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Choose pivots, then the tokens that each of them keeps."""
        counts, previous = view.counts_tensor(), view.previous_attention
        _, keys = view.unrotated()
        norm = _norms(keys, previous.slot).masked_fill(~view.slot_valid, 0)
        keep = self._pivots_kept(view, norm, counts)
        visual, visual_valid = _largest(norm, keep, self.visual_pivots)
        text, text_valid = _largest(_norms(keys, previous.text), view.text_valid, self.text_pivots)
        states = gather_tokens(view.hidden, view.text.gather(1, text).to(view.hidden.device))
        pivots = torch.cat(
            [gather_tokens(view.features, visual), states.to(view.features.device)], 1
        )
        pivot_valid = torch.cat([visual_valid, text_valid], 1)
        directions = normalize(view.features.float(), dim=-1)
        alike = normalize(pivots.float(), dim=-1) @ directions.transpose(1, 2)
        alike = alike.round(decimals=5)  # products of equal vectors differ in the last digits
        rest = (counts - keep.sum(1)).clamp(min=0)[:, None]
        sharers = pivot_valid.sum(1, keepdim=True).clamp(min=1)
        turn = pivot_valid.cumsum(1) - 1
        share = (rest // sharers + (turn < rest % sharers)).masked_fill(~pivot_valid, 0)
        for pivot in range(pivots.shape[1]):
            keep = keep | top_k_mask(-alike[:, pivot], view.slot_valid & ~keep, share[:, pivot])
        nearest = alike.masked_fill(~pivot_valid[..., None], -1).amax(1)
        return Decision(keep, scores={"norm": norm, "alike": nearest})

    def _pivots_kept(self, view: View, norm: Tensor, counts: Tensor) -> Tensor:
        """Return (B, V) bool: the visual pivots, and the largest of each image as far as it needs
        them.
        """
        number = counts.clamp(max=self.visual_pivots)
        if view.min_tokens_per_image:
            images = torch.tensor([len(grids) for grids in view.layout.grids], device=counts.device)
            number = torch.maximum(
                number, torch.minimum(images * view.min_tokens_per_image, counts)
            )
        return keep_best(view, norm, number)


def _norms(keys: Tensor, index: Tensor) -> Tensor:
    """Return (B, n) float32: the L1 norms of all heads' keys (B, Hk, L, d) of (B, n) tokens."""
    key = gather_heads(keys, index.to(keys.device))
    return key.float().abs().sum((1, 3)).to(index.device)


def _largest(norm: Tensor, valid: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the places (B, number) of the valid tokens of the largest norm in falling order, and
    which of them are valid.
    """
    number = min(number, norm.shape[1])
    order = descending_rank(norm, valid).argsort(dim=1)[:, :number]
    return order, torch.arange(number, device=norm.device) < valid.sum(1, keepdim=True)
