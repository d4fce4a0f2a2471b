"""SparseVLM (Zhang et al., 2025, arXiv 2410.04417): relevant text rates, and some is recycled.

The raters are the text tokens that are relevant to the image. A visual token's score is the
attention that it gets from the raters, averaged over raters and heads. The rank of that attention
tells how many tokens are redundant and are dropped. The best of the dropped tokens are put into
clusters, and the hidden state of each cluster's centre becomes the sum of those of its tokens.

The readings taken here: the raters are chosen once, by the decoder's input embeddings; the
attention is that of the layer before the pruning layer; the rank counts singular values above a
share of the largest; densities and distances of the clusters are means over the hidden size; and a
cluster stands at the place of its centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from atp_patch.contract import Decision, Recycled, View
from atp_patch.contract.errors import ConfigError
from atp_patch.maths import (
    attention_rank,
    cluster_weights,
    cross_rows,
    density_peaks,
    gather_heads,
    gather_tokens,
    pack,
    raters,
    top_k_mask,
)
from atp_patch.methods.base import Ranking, choice, minimum_counts


@dataclass(frozen=True)
class SparseVLM(Ranking):
    """Text-guided sparsification with recycling.

    Without a budget the rank decides how many tokens are dropped: ``scale * (tokens - rank)``. A
    budget counts the clusters among the tokens that are kept.

    Attributes:
        scale: the paper's lambda, above 0 and at most 1.
        rank_tolerance: singular values up to this share of the largest count as zero.
        recycle_share: the share of the dropped tokens, the best first, that is recycled (tau).
        cluster_share: the number of clusters divided by the number of recycled tokens (theta).
        neighbours: the number of nearest tokens from which a token's density is computed.
        merge: whether a cluster becomes the "sum" of its tokens (as in the paper) or their "mean".
    """

    name: ClassVar[str] = "sparsevlm"
    summary: ClassVar[str] = "attention of relevant text tokens, as many as its rank, recycling"

    scale: float = 0.8
    rank_tolerance: float = 1e-3
    recycle_share: float = 0.3
    cluster_share: float = 0.1
    neighbours: int = 5
    merge: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("merge", self.merge, ("sum", "mean"))
        if not 0 < self.scale <= 1:
            raise ConfigError(f"scale={self.scale} must be above 0 and at most 1.")
        if not 0 < self.rank_tolerance < 1:
            raise ConfigError(f"rank_tolerance={self.rank_tolerance} must be between 0 and 1.")
        if not 0 <= self.recycle_share < 1 or not 0 <= self.cluster_share <= 1:
            raise ConfigError(
                f"recycle_share={self.recycle_share} must be at least 0 and below 1, "
                f"cluster_share={self.cluster_share} between 0 and 1."
            )
        if self.neighbours < 1:
            raise ConfigError(f"neighbours={self.neighbours} must be at least 1.")

    @property
    def needs_budget(self) -> bool:
        """False: without a budget the rank of the attention decides."""
        return False

    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Keep the tokens that the raters attend to, and the centres of clusters of the others."""
        rater = self._raters(view)
        rows = cross_rows(
            gather_heads(view.query, view.text),
            view.key,
            rater,
            view.slot + view.key_offset,
            view.slot_valid,
            view.scaling,
            mask=view.mask_rows(view.text),
            softcap=view.softcap,
            sinks=view.sinks,
        )
        scores = rows.sum(1) / rater.sum(1, keepdim=True).clamp(min=1)
        kept, clusters = self._counts(view, rater, rows)
        keep = self.best(view, scores, kept)
        recycled = self._recycle(view, scores, keep, clusters)
        if recycled is not None:
            length = keep.shape[1]
            centre = torch.where(recycled.valid, recycled.column, length)
            keep = nn.functional.pad(keep, (0, 1)).scatter(1, centre, True)[:, :length]
        return Decision(keep, scores={"raters": scores}, recycled=recycled)

    def _raters(self, view: View) -> Tensor:
        """Return (B, T) bool, True for raters.

        Raters are chosen by the decoder's input embeddings, so they are the same at every pruning
        layer.
        """
        embeds, layout = view.embeds, view.layout
        assert embeds is not None
        visual = gather_tokens(embeds, layout.position)
        text = gather_tokens(embeds, view.text_position)
        return raters(visual, layout.valid, text, view.text_valid)

    def _counts(self, view: View, rater: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) int64 each: the numbers of tokens that are kept unchanged, and of
        clusters.
        """
        left, minimum = view.slot_valid.sum(1), minimum_counts(view)
        share = self.recycle_share * self.cluster_share
        if view.counts is None:
            redundant = left - attention_rank(rows, self.rank_tolerance)
            gone = (self.scale * redundant).floor().long()
            # Without text, it is not known what is redundant, and nothing is dropped.
            gone = torch.where(rater.any(1), torch.minimum(gone, left - minimum), 0)
            return left - gone, (share * gone).round().long()
        counts = view.counts_tensor()
        # gone - share * gone = left - counts
        clusters = (share / (1 - share) * (left - counts)).round().long()
        clusters = torch.minimum(clusters, torch.minimum(counts // 2, counts - minimum))
        clusters = clusters.clamp(min=0)
        return counts - clusters, clusters

    def _recycle(
        self, view: View, scores: Tensor, keep: Tensor, clusters: Tensor
    ) -> Recycled | None:
        """Put the best of the dropped tokens into clusters; None if there are none."""
        goes = view.slot_valid & ~keep
        pool = (self.recycle_share * goes.sum(1)).round().long()
        chosen = top_k_mask(scores, goes, torch.where(clusters > 0, pool.maximum(clusters), 0))
        index, valid = pack(chosen)
        if index.shape[1] == 0:
            return None
        place = view.slot.gather(1, index).to(view.hidden.device)
        states = gather_tokens(view.hidden, place).to(index.device)
        centre = density_peaks(states, valid, clusters, self.neighbours)
        made = cluster_weights(index, centre, keep.shape[1], mean=self.merge == "mean")
        return Recycled(*made)
