"""The vision tower's attention, and the tokens made of it: what merging before the decoder hooks.

The attention of one block is recorded as in the decoder (never recomputed, whatever its
implementation). Where the projector works token by token, its inputs are merged, as in the paper;
where it joins patches, its outputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atp_patch.contract import Merge, Quota, TokenGroups, Tower
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.maths import cross_scores
from atp_patch.seam.door.tombstones import with_tombstones
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.recorder import Recorder, Recording


class Sharer(Protocol):
    """How many tokens to keep of each group, given each group's tokens and its placeholders."""

    def __call__(self, tokens: Sequence[int], places: Sequence[int]) -> tuple[Quota, ...] | None:
        """None: the method decides."""


class VisionHooks(Protocol):
    """Hooks on a vision tower."""

    def install(self, add: Callable[[Any], None]) -> None:
        """Register them; ``add`` takes their handles."""

    def remove(self) -> None:
        """Take back what is no hook."""


class _Merging(PerThread):
    """What the tower left for the projector in the running thread.

    Attributes:
        grids: frames, height and width in patches of each picture, of towers that get rows of
            patches.
        recorded: the attention of the block that is watched, one call or more.
        merged: the groups, what was chosen of them, and the row of each token.
    """

    def __init__(self) -> None:
        self.grids: list[tuple[int, int, int]] = []
        self.recorded: list[Recording] = []
        self.merged: tuple[TokenGroups, Merge, Tensor] | None = None


class MergeHooks:
    """Hooks on a vision tower and what follows it.

    Args:
        base: the model without its head.
        tower: where things are.
        merge: the method; ``quotas``: the budget; ``minimum``: tokens of a group at least.
        active: whether this call of the tower is part of a pass that may be pruned.
        recorder: records the tower's attention.
    """

    def __init__(
        self,
        base: Any,
        tower: Tower,
        merge: Callable[[TokenGroups], Merge],
        quotas: Sharer,
        minimum: int,
        active: Callable[[], bool],
        recorder: Recorder,
    ) -> None:
        self.base, self.tower, self.merge, self.quotas = base, tower, merge, quotas
        self.minimum, self.active, self.recorder = minimum, active, recorder
        self._here = _Merging()

    def install(self, add: Callable[[Any], None]) -> None:
        """Register the hooks; ``add`` takes their handles."""
        for tower in self._towers():
            if self.tower.packed:
                add(tower.register_forward_pre_hook(self._before_tower, with_kwargs=True))
            attention = self._attention(tower)
            self.recorder.watch(attention)
            add(attention.register_forward_pre_hook(self._before_attention))
            add(attention.register_forward_hook(self._after_attention, always_call=True))
        projector = self.base.get_submodule(self.tower.projector)
        if self.tower.tokenwise:
            add(projector.register_forward_pre_hook(self._before_projector))
        add(projector.register_forward_hook(self._after_projector))

    def remove(self) -> None:
        """Give the towers' attention its own config back."""
        for tower in self._towers():
            self.recorder.release(self._attention(tower))

    def _towers(self) -> list[nn.Module]:
        return [self.base.get_submodule(name) for name in self.tower.modules]

    def _attention(self, tower: nn.Module) -> Any:
        # In early versions of transformers the tower is a model around the one that has the blocks.
        inner: Any = getattr(tower, "vision_model", tower)
        blocks: Any = inner.get_submodule(self.tower.blocks)
        return blocks[self.tower.block].get_submodule(self.tower.attention)

    # -- hooks ------------------------------------------------------------------------------------

    def _before_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._here.grids = [(t, h, w) for t, h, w in grid.tolist()]

    def _before_attention(self, module: nn.Module, args: Any) -> None:
        self._here.recorded, self._here.merged = [], None
        if self.active():
            self.recorder.expect(module, self._here.recorded.append, every=True)

    def _after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.forget()

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self._here.recorded:
            return None
        features, *rest = args
        groups, place = self._groups(features)
        return (self._merge_rows(features, groups, place), *rest)

    def _after_projector(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._here.recorded and not self.tower.tokenwise:
            groups, place = self._groups(output)
            output = self._merge_rows(output, groups, place)
        if self._here.merged is None:
            return None
        (groups, merge, place), self._here.merged = self._here.merged, None
        gone = groups.valid & ~merge.keep
        parity = groups.row + groups.column
        flat = output.reshape(-1, output.shape[-1])
        rows, parity = place[gone].to(flat.device), parity[gone].to(flat.device)
        return with_tombstones(flat, rows, parity).reshape(output.shape)

    # -- groups -----------------------------------------------------------------------------------

    def _merge_rows(self, features: Tensor, groups: TokenGroups, place: Tensor) -> Tensor:
        """Features (..., D) whose kept rows are merged; what goes becomes a tombstone after the
        projector.
        """
        merge = self.merge(groups)
        self._here.merged = (groups, merge, place)
        flat, home = features.reshape(-1, features.shape[-1]), groups.valid.device
        given = flat.to(home)[place].masked_fill(~groups.valid[..., None], 0)
        made = (merge.weight @ given.float())[merge.changed]
        rows = place.gather(1, merge.index)[merge.changed]
        flat = flat.index_put((rows.to(flat.device),), made.to(flat))
        return flat.reshape(features.shape)

    def _counts(self, tokens: Sequence[int], places: Sequence[int]) -> tuple[int, ...] | None:
        quotas = self.quotas(tokens, places)
        return None if quotas is None else tuple(quota.tokens for quota in quotas)

    def _groups(self, features: Tensor) -> tuple[TokenGroups, Tensor]:
        """The groups of tokens, and the row of ``features`` in which each token stands (G, n)."""
        recorded, self._here.recorded = self._here.recorded, []
        with torch.no_grad():
            if self.tower.packed:
                return self._packed(recorded)
            return self._square(recorded[0], features.shape[:2])

    def _square(self, recording: Recording, shape: Sequence[int]) -> tuple[TokenGroups, Tensor]:
        number, rows = shape
        lead = int(self.tower.class_token)
        patches = recording.key.shape[2] - lead
        extra = lead if rows == recording.key.shape[2] else 0
        side, cells = round(patches**0.5), round((patches / max(rows - extra, 1)) ** 0.5)
        small = side // max(cells, 1)
        if side**2 != patches or small**2 != rows - extra or small * cells != side:
            raise UnsupportedModelError(
                f"{patches} patches became {rows} tokens: no square grid, so they cannot be "
                "matched; use a method that prunes inside the decoder."
            )
        attention, key = _received(recording, lead)
        device = attention.device

        def joined(table: Tensor) -> Tensor:  # (G, patches, *) -> (G, tokens, cell, *)
            parts = table.unflatten(1, (small, cells, small, cells)).transpose(2, 3)
            return parts.flatten(3, 4).flatten(1, 2)

        token = torch.arange(small**2, device=device).expand(number, -1)
        place = torch.arange(number, device=device)[:, None] * rows + extra + token
        tokens = [small**2] * number
        groups = TokenGroups(
            attention=joined(attention).sum(2),
            key=joined(key).mean(2),
            valid=torch.ones_like(token, dtype=torch.bool),
            row=token // small,
            column=token % small,
            heights=[small] * number,
            widths=[small] * number,
            counts=self._counts(tokens, [rows] * number),
            minimum=self.minimum,
        )
        return groups, place

    def _packed(self, recorded: list[Recording]) -> tuple[TokenGroups, Tensor]:
        cell = self.tower.cell
        query, key = (
            torch.cat([getattr(part, name) for part in recorded], 2) for name in ("query", "key")
        )
        frames = [(h // cell, w // cell) for t, h, w in self._here.grids for _ in range(t)]
        tokens = [height * width for height, width in frames]
        device, longest = query.device, max(tokens)
        shape = (len(frames), longest)
        attention = torch.zeros(shape, device=device)
        keys = torch.zeros(*shape, key.shape[1] * key.shape[3], device=device)
        row, column, place = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(3))
        start = 0
        for number, (height, width) in enumerate(frames):
            count = tokens[number]
            part = slice(start * cell**2, (start + count) * cell**2)
            one = Recording(query[:, :, part], key[:, :, part], None, recorded[0].scaling)
            paid, made = _received(one, 0)
            attention[number, :count] = paid[0].unflatten(0, (count, -1)).sum(1)
            keys[number, :count] = made[0].unflatten(0, (count, -1)).mean(1)
            order = window_order(height, width, self.tower.window).to(device)
            row[number, :count], column[number, :count] = order // width, order % width
            place[number, :count] = torch.arange(start, start + count, device=device)
            start += count
        valid = torch.arange(longest, device=device) < torch.tensor(tokens, device=device)[:, None]
        heights, widths = zip(*frames, strict=True)
        counts = self._counts(tokens, tokens)
        groups = TokenGroups(
            attention, keys, valid, row, column, heights, widths, counts, self.minimum
        )
        return groups, place


def window_order(height: int, width: int, window: int) -> Tensor:
    """(height * width,) int64: the grid's places, window by window, in reading order within.

    Args:
        window: tokens along a side; 0: the whole grid is one.
    """
    place = torch.arange(height * width)
    if not window:
        return place
    row, column = place // width, place % width
    across = -(-width // window)
    return ((row // window) * across + column // window).argsort(stable=True)


def _received(recording: Recording, lead: int) -> tuple[Tensor, Tensor]:
    """What attention each patch gets (G, n), and all heads' keys of each (G, n, d), both float32.

    With a class token (``lead`` 1) it is the class token's attention among the patches (PruMerge
    eq. 2), else that of all patches on average.
    """
    query, key = recording.query, recording.key
    batch, device = key.shape[0], key.device
    patch = torch.arange(lead, key.shape[2], device=device).expand(batch, -1)
    rows = query[:, :, :1] if lead else query
    attention = cross_scores(
        rows,
        key,
        torch.ones(batch, rows.shape[2], dtype=torch.bool, device=device),
        patch,
        torch.ones_like(patch, dtype=torch.bool),
        recording.scaling,
        renormalise=True,
        chunk_rows=256,
    )
    return attention, key[:, :, lead:].transpose(1, 2).flatten(2).float()
