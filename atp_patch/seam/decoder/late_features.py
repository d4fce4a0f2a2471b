"""Features that the host adds to visual tokens before some of its layers, by a mask of the whole
sequence.

Granite 4 Vision's pictures enter as zeros, and every third layer up to the middle gets features of
its own. A mask of the whole sequence does not fit the tokens that are left. So a pass that may
prune takes these features out of the decoder's arguments, lets them go and merge with the tokens
that they belong to, and adds them itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_patch.seam.decoder.visual_tokens import TokenState

_MASK, _FEATURES = "vision_mask", "deepstack_features"


class LateFeatures:
    """The features of one forward pass.

    Args:
        mask: (B, L, 1) bool, True at the tokens that get features.
        features: layer -> (N, D), what is added before it, in the order of these tokens.
        embeds: (B, L, D), what is about to enter the decoder.
    """

    def __init__(self, mask: Tensor, features: dict[int, Tensor], embeds: Tensor) -> None:
        self.mask = mask
        # layer -> (B, L', D), a row for each token that reaches the layer, zeros at text.
        self.tables = {
            layer: torch.zeros_like(embeds).masked_scatter(mask, rows.to(embeds))
            for layer, rows in features.items()
        }

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> LateFeatures | None:
        """Return the features among the decoder's arguments, or None where there are none."""
        mask, features = kwargs.get(_MASK), kwargs.get(_FEATURES)
        if mask is None or not features:
            return None
        embeds = kwargs["inputs_embeds"]
        return cls(mask.to(embeds.device), features, embeds)

    def take(self, kwargs: dict[str, Any]) -> None:
        """Take the features out of the decoder's arguments, so that the host adds none."""
        kwargs[_MASK] = kwargs[_FEATURES] = None

    def shown(self, embeds: Tensor) -> Tensor:
        """Return (B, L, D) embeddings that show of each visual token the features that come
        first.
        """
        return torch.where(self.mask, self.tables[min(self.tables)], embeds)

    def added(self, layer: int, hidden: Tensor) -> Tensor:
        """Return (B, L', D) hidden states that enter a layer, with the features added before it."""
        table = self.tables.get(layer)
        return hidden if table is None else hidden + table.to(hidden)

    def follow(self, layer: int, tokens: TokenState) -> None:
        """Drop and merge the features of later layers, as the tokens before ``layer`` have been.

        What layer 0 adds is merged only: it meets embeddings that are merged but not yet narrowed.
        """
        for later, table in self.tables.items():
            if later > layer:
                merged = tokens.merged(layer, table)
                self.tables[later] = tokens.narrow_hidden(layer, merged)
            elif later == layer == 0:
                self.tables[later] = tokens.merged(layer, table)
