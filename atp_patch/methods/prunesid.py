"""PruneSID (Fang et al., arXiv 2603.09480): groups by principal directions, the best of each.

Groups (§3.2, principal semantic components): ``X`` is the sigmoid of the features minus its mean,
``X^T = U S V^T``, and token ``i`` is in the group ``g(i)`` of the largest ``|V_ij|``. There are
``K = N // 4`` groups for a budget of ``N`` tokens.

Within a group (§3.3) a token's score is ``s_i = |V_ig(i)|``. From the highest on, a token stays
unless one that stays is more similar to it (cosine) than ``lambda rho``, where ``rho`` is the mean
similarity of all pairs of the image and ``lambda = N / 32``. Groups keep their best in proportion
to how many stayed.

The readings taken here: features are those behind the projector; as ``N / 32`` belongs to images of
576 tokens, ``lambda = 18 N / n``; each group keeps one before any keeps two, and where fewer than
``N`` stayed, the best of the others follow. The paper's dynamic budget is proportional to the
information ``1 - rho`` of an image; as budgets are kept here, it divides a sample's budget among
its images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from atp_patch.contract import Decision, DoorMethod, DoorView
from atp_patch.maths import (
    cosine_similarities,
    even_counts,
    principal_loadings,
    ranked,
    suppress,
)
from atp_patch.methods.images import Images

_TOKENS_TO_A_GROUP = 4
_LAMBDA = 18.0  # N / 32 for 576 tokens, as a factor of N / n


@dataclass(frozen=True)
class PruneSID(DoorMethod):
    """Keep the most salient tokens of groups that share a direction, without near-duplicates.

    Attributes:
        adaptive: whether images of a sample that hold more information keep more of its tokens.
    """

    name: ClassVar[str] = "prunesid"
    summary: ClassVar[str] = "groups by principal directions, the best of each that differ"
    reads_question: ClassVar[bool] = False

    adaptive: bool = False

    def decide(self, view: DoorView) -> Decision:
        """Group the tokens of each image, suppress duplicates, and share the budget out."""
        images = Images.of(view)
        valid, features = images.valid, images.of_tokens(view.features)
        similarity = cosine_similarities(features, valid)
        size = valid.sum(1)
        total = similarity.sum((1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(1)
        redundancy = total / (size * (size - 1)).clamp(min=1)
        if self.adaptive:
            images = replace(images, counts=_by_information(view, images, redundancy))
        score, group = _groups(features, valid, images.counts)
        rank = ranked(valid, score)
        threshold = _LAMBDA * images.wanted / size.clamp(min=1) * redundancy
        stays = suppress(similarity, rank, group, valid, threshold)
        together = (group[:, :, None] == group[:, None]) & stays[:, None]
        members = together.sum(2).clamp(min=1)
        better = (together & (rank[:, None] < rank[:, :, None])).sum(2)
        # The same share of each group comes first: with all tokens up to t of the way through
        # their group, groups keep in proportion to their members.
        through = (better / members).masked_fill(~stays, 1.0)
        keep = (ranked(valid, -through, score) < images.wanted[:, None]) & valid
        return Decision(images.to_tokens(keep), scores={"loading": images.to_tokens(score)})


def _groups(features: Tensor, valid: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (G, n) float32, the loading of each token on its direction, and (G, n) int64, the
    direction.

    Images with equally many groups are computed together.
    """
    score = torch.zeros(valid.shape, device=valid.device)
    group = torch.zeros_like(valid, dtype=torch.long)
    numbers = [max(count // _TOKENS_TO_A_GROUP, 1) for count in counts]
    for number in sorted(set(numbers)):
        rows = torch.tensor([i for i, n in enumerate(numbers) if n == number], device=valid.device)
        most = min(number, *features.shape[1:])
        best = principal_loadings(features[rows], valid[rows], most).max(2)
        score[rows], group[rows] = best.values, best.indices
    return score, group


def _by_information(view: DoorView, images: Images, redundancy: Tensor) -> tuple[int, ...]:
    """Return the counts of a sample's images, by their sizes and by ``1 - redundancy``."""
    information = (1 - redundancy).clamp(min=0).tolist()
    counts: list[int] = []
    for grids in view.layout.grids:
        part = slice(len(counts), len(counts) + len(grids))
        sizes = [grid.length for grid in grids]
        weights = [size * left for size, left in zip(sizes, information[part], strict=True)]
        whole = sum(images.counts[part])
        counts += even_counts(
            whole, sizes, view.min_tokens_per_image, weights if any(weights) else sizes
        )
    return tuple(counts)
