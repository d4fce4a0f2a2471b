"""Which keys the queries of one attention call see; only the rows that are read are built.

A table of all queries and keys of 20,000 tokens takes 381 MiB. Scores need a few rows of it, and
some methods need none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """The mask of one attention call, from which some rows or the whole can be built.

    ``B`` batch, ``h`` heads or 1, ``Q`` queries, ``K`` keys.

    Attributes:
        given: the mask that the host gave to the attention. It is (B or 1, h, Q, K or more), bool
            (True = visible) or float (added to the logits); or (B, K or more) bool or int, False or
            0 at keys that no query sees; or None. In the last two cases attention is causal as
            well.
        queries, keys: the numbers Q and K; the queries' own keys are the last Q keys.
        gone: (B, K) bool, keys that are hidden in addition, or None.
    """

    given: Tensor | None
    queries: int
    keys: int
    gone: Tensor | None = None

    def rows(self, index: Tensor) -> Tensor:
        """Build the rows of the queries with the numbers ``index``, (B, T) int64.

        Returns:
            (B, h, T, K) bool, True at visible keys, or float, to be added to the logits.
        """
        if self.given is not None and self.given.ndim == 4:
            wide = self.given[..., : self.keys].expand(len(index), -1, -1, -1)
            _, heads, _, keys = wide.shape
            place = index.to(wide.device)[:, None, :, None].expand(-1, heads, -1, keys)
            return self._without_gone(wide.gather(2, place))
        own = torch.arange(self.keys, device=index.device) - (self.keys - self.queries)
        visible = (own <= index[..., None])[:, None]
        if self.given is not None:
            seen = self.given[:, None, None, -self.keys :].bool()
            visible = visible & seen.to(visible.device)
        return self._without_gone(visible)

    def whole(self, device: torch.device) -> Tensor:
        """Build the rows of all queries, (B or 1, h, Q, K), bool or float as in :meth:`rows`."""
        if self.given is not None and self.given.ndim == 4:
            return self._without_gone(self.given[..., : self.keys])
        return self.rows(torch.arange(self.queries, device=device)[None])

    def _without_gone(self, mask: Tensor) -> Tensor:
        if self.gone is None:
            return mask
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill(self.gone.to(mask.device)[:, None, None, :], hidden)
