"""The visual tokens of a door view, image by image: each image chooses among its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_patch.contract import DoorView, Recycled
from atp_patch.maths import cluster_weights, even_counts


@dataclass(frozen=True)
class Images:
    """The images of all samples as rows. A tile is an image, and so is a whole video.

    ``G`` images, ``n`` tokens of the largest, ``B`` samples, ``V`` visual tokens of the largest.

    Attributes:
        index: (G, n) int64, each token's number among all slots of the samples, ``B * V``.
        valid: (G, n) bool, False in padding slots.
        counts: for each image, the number of tokens that it keeps.
        shape: ``B`` and ``V``.
    """

    index: Tensor
    valid: Tensor
    counts: tuple[int, ...]
    shape: torch.Size

    @classmethod
    def of(cls, view: DoorView) -> Images:
        """Return the images of a view. A sample's count is divided among its images by their sizes.

        Each image keeps at least ``view.min_tokens_per_image`` of its tokens.

        Raises:
            ConfigError: if the patch was made without a budget.
        """
        starts, sizes, counts = [], [], []
        width = view.slot_valid.shape[1]
        for b, (grids, count) in enumerate(
            zip(view.layout.grids, view.counts_tensor().tolist(), strict=True)
        ):
            lengths, at = [grid.length for grid in grids], b * width
            counts += even_counts(count, lengths, view.min_tokens_per_image)
            for length in lengths:
                starts.append(at)
                sizes.append(length)
                at += length
        device = view.slot_valid.device
        first, size = torch.tensor([starts, sizes], dtype=torch.long, device=device)[..., None]
        place = torch.arange(max(sizes, default=0), device=device)
        valid = place < size
        return cls(torch.where(valid, first + place, 0), valid, tuple(counts), view.token.shape)

    @property
    def wanted(self) -> Tensor:
        """(G,) int64: the counts, on the device of the tokens."""
        return self.tensor(self.counts)

    def tensor(self, numbers: Sequence[int]) -> Tensor:
        """Return (G,) int64: one number for each image, on the device of the tokens."""
        return torch.tensor(numbers, dtype=torch.long, device=self.index.device)

    @property
    def sample(self) -> Tensor:
        """(G,) int64: the sample of each image."""
        return self.index[:, 0] // max(self.shape[1], 1)

    def of_tokens(self, values: Tensor) -> Tensor:
        """Turn (B, V, *) values of the view's tokens into (G, n, *); padding slots hold
        anything.
        """
        return values.flatten(0, 1)[self.index]

    def merging(self, joined: Tensor) -> Recycled:
        """Return what makes each kept token the mean of the tokens that join it.

        Args:
            joined: (G, n) int64, for each token the one that it joins, by its number in the image.
                A kept token joins itself; -1 is for tokens that join none.
        """
        column = self.index.gather(1, joined.clamp(min=0)) % self.shape[1]
        centre = self.to_tokens(torch.where(joined < 0, -1, column), fill=-1)
        place = torch.arange(self.shape[1], device=centre.device).expand(self.shape)
        return Recycled(*cluster_weights(place, centre, self.shape[1], mean=True))

    def to_tokens(self, values: Tensor, fill: float = 0) -> Tensor:
        """Turn (G, n) values into (B, V) values of the view's tokens, with ``fill`` in its padding
        slots.
        """
        total = self.shape.numel()
        made = values.new_full((total + 1,), fill)
        index = torch.where(self.valid, self.index, total)
        return made.scatter(0, index.flatten(), values.flatten())[:total].reshape(self.shape)
