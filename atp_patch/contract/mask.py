"""Which keys the queries of one attention call see; only the rows that are read are built.

A table of all queries and keys of 20,000 tokens takes 381 MiB. Scores need a few rows of it, and
some methods need none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """The mask of one attention call, from which some rows or the whole can be built.

    ``B`` batch, ``h`` heads or 1, ``Q`` queries, ``K`` keys of the call. Of these ``n`` and ``k``
    are left, which are all of them unless :meth:`among` has chosen.

    Attributes:
        given: the mask that the host gave to the attention. It is (B or 1, h, Q, K or more), bool
            (True = visible) or float (added to the logits); or (B, K or more) bool or int, False or
            0 at keys that no query sees; or None. In the last two cases attention is causal as
            well.
        queries, keys: the numbers Q and K; the queries' own keys are the last Q keys.
        gone: (B, k) bool, keys that are hidden in addition, or None.
        query_index: (B, n) int64, the queries that are left, or None for all.
        key_index: (B, k) int64, the keys that are left, or None for all.
    """

    given: Tensor | None
    queries: int
    keys: int
    gone: Tensor | None = None
    query_index: Tensor | None = None
    key_index: Tensor | None = None

    def among(self, query_index: Tensor, key_index: Tensor, gone: Tensor | None) -> AttentionMask:
        """Return the mask for some of the queries and keys; nothing is built.

        Args:
            query_index: (B, n) int64, numbers of queries.
            key_index: (B, k) int64, numbers of keys.
            gone: (B, k) bool, keys among these that are hidden, or None.
        """
        return replace(self, query_index=query_index, key_index=key_index, gone=gone)

    def rows(self, index: Tensor) -> Tensor:
        """Build the rows of the queries with the numbers ``index``, (B, T) int64.

        Returns:
            (B, h, T, k) bool, True at visible keys, or float, to be added to the logits.
        """
        if self.query_index is not None:
            index = self.query_index.to(index.device).gather(1, index)
        made = self._of_call(index)
        if self.key_index is not None:
            column = self.key_index.to(made.device)[:, None, None]
            made = made.expand(len(column), -1, -1, -1)
            made = made.gather(3, column.expand(-1, *made.shape[1:3], -1))
        return self._without_gone(made)

    def whole(self, device: torch.device) -> Tensor:
        """Build the rows of all queries, (B or 1, h, n, k), bool or float as in :meth:`rows`."""
        if self.query_index is not None:
            left = torch.arange(self.query_index.shape[1], device=device)
            return self.rows(left.expand(len(self.query_index), -1))
        if self.key_index is None and self.given is not None and self.given.ndim == 4:
            return self._without_gone(self.given[..., : self.keys])
        return self.rows(torch.arange(self.queries, device=device)[None])

    def _of_call(self, index: Tensor) -> Tensor:
        """Return rows of the call's own mask, (B, h, T, K), for (B, T) numbers of its queries."""
        if self.given is not None and self.given.ndim == 4:
            wide = self.given[..., : self.keys].expand(len(index), -1, -1, -1)
            _, heads, _, keys = wide.shape
            place = index.to(wide.device)[:, None, :, None].expand(-1, heads, -1, keys)
            return wide.gather(2, place)
        own = torch.arange(self.keys, device=index.device) - (self.keys - self.queries)
        visible = (own <= index[..., None])[:, None]
        if self.given is not None:
            seen = self.given[:, None, None, -self.keys :].bool()
            visible = visible & seen.to(visible.device)
        return visible

    def _without_gone(self, mask: Tensor) -> Tensor:
        if self.gone is None:
            return mask
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill(self.gone.to(mask.device)[:, None, None, :], hidden)
