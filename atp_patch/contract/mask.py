"""Which keys the queries of one attention call see, without tables that nobody asks for.

A table of all queries and keys of 20,000 tokens takes 381 MiB. Scores need a few rows of it, and
some methods need none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """The mask of one attention call, of which rows or the whole can be asked for.

    ``B`` batch, ``h`` heads or 1, ``Q`` queries, ``K`` keys.

    Attributes:
        given: what the host gave to the attention: (B or 1, h, Q, K or more) bool (True = visible)
            or float (added to the logits); (B, K or more) bool or int, False at keys that nothing
            sees; or None. In the last two cases a query sees no key behind it.
        queries, keys: how many there are; the last queries' keys stand last.
        gone: (B, K) bool, keys that are hidden besides, or None.
    """

    given: Tensor | None
    queries: int
    keys: int
    gone: Tensor | None = None

    def rows(self, index: Tensor) -> Tensor:
        """The rows of some queries (B, T) int64.

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
        """(B or 1, h, Q, K), as of :meth:`rows`, for all queries."""
        if self.given is not None and self.given.ndim == 4:
            return self._without_gone(self.given[..., : self.keys])
        return self.rows(torch.arange(self.queries, device=device)[None])

    def _without_gone(self, mask: Tensor) -> Tensor:
        if self.gone is None:
            return mask
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill(self.gone.to(mask.device)[:, None, None, :], hidden)
