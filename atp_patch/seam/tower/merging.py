"""Merging tokens between the vision tower and the decoder.

The attention of one block of the tower is recorded as in the decoder, whatever its implementation,
and never computed again. Where the projector works token by token, its inputs are merged, as in the
paper. Where it joins patches, its outputs are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from atp_patch.contract import Merge, Quota, TokenGroups, Tower
from atp_patch.seam.door.tombstones import with_tombstones
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.recorder import Recorder, Recording
from atp_patch.seam.tower.groups import PatchGrid, blocks_of, tower_groups


class QuotaRule(Protocol):
    """Says how many tokens of each group are kept.

    A group is one image, tile or frame. It is given the numbers of tokens and of placeholders of
    each group.
    """

    def __call__(
        self, tokens: Sequence[int], placeholders: Sequence[int]
    ) -> tuple[Quota, ...] | None:
        """Return the quota of each group, or None where the method decides."""


class VisionHooks(Protocol):
    """Hooks on a vision tower."""

    def install(self, add: Callable[[Any], None]) -> None:
        """Register them; ``add`` takes their handles."""

    def remove(self) -> None:
        """Undo what ``install`` has changed besides hooks."""

    def forget(self) -> None:
        """Forget what the running thread's last pass has left."""


class _Merging(PerThread):
    """What the hooks know of the tower's run in the running thread.

    Attributes:
        grids: those of all pictures, where the tower takes rows of patches.
        recorded: the attention of the block that is watched, in one call or more.
        merged: the groups, what becomes of them, and (G, n) int64 the row of each token; None where
            nothing was merged.
    """

    def __init__(self) -> None:
        self.grids: list[PatchGrid] = []
        self.recorded: list[Recording] = []
        self.merged: tuple[TokenGroups, Merge, Tensor] | None = None


class MergeHooks:
    """Hooks on a vision tower and its projector that merge tokens.

    Args:
        base: the model without its head.
        tower: where the tower's parts are.
        merge: the method's choice.
        quotas: the budget.
        minimum: how many tokens each group keeps at least.
        active: tells whether this call of the tower is part of a pass that may be pruned.
        recorder: records the tower's attention.
    """

    def __init__(
        self,
        base: Any,
        tower: Tower,
        merge: Callable[[TokenGroups], Merge],
        quotas: QuotaRule,
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

    def forget(self) -> None:
        """Forget what the running thread's last pass has left."""
        self._here.grids, self._here.recorded, self._here.merged = [], [], None

    def _towers(self) -> list[nn.Module]:
        return [self.base.get_submodule(name) for name in self.tower.modules]

    def _attention(self, tower: nn.Module) -> Any:
        return blocks_of(tower, self.tower)[self.tower.block].get_submodule(self.tower.attention)

    # -- hooks ------------------------------------------------------------------------------------

    def _before_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._here.grids = [PatchGrid(t, h, w, self.tower.cell) for t, h, w in grid.tolist()]

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
        """Return features (..., D) whose kept rows are merged.

        The rows that are dropped become tombstones behind the projector.

        Args:
            features: (..., D).
            groups: the tokens in their groups.
            place: (G, n) int64, the row of each token among the features.
        """
        merge = self.merge(groups)
        self._here.merged = (groups, merge, place)
        flat, home = features.reshape(-1, features.shape[-1]), groups.valid.device
        given = flat.to(home)[place].masked_fill(~groups.valid[..., None], 0)
        made = (merge.weight @ given.float())[merge.changed]
        rows = place.gather(1, merge.index)[merge.changed]
        flat = flat.index_put((rows.to(flat.device),), made.to(flat))
        return flat.reshape(features.shape)

    def _counts(self, tokens: Sequence[int], placeholders: Sequence[int]) -> tuple[int, ...] | None:
        quotas = self.quotas(tokens, placeholders)
        return None if quotas is None else tuple(quota.tokens for quota in quotas)

    def _groups(self, features: Tensor) -> tuple[TokenGroups, Tensor]:
        """Return the groups of tokens, and (G, n) int64 the row of each token among the
        features.
        """
        here = self._here
        recorded, here.recorded = here.recorded, []
        return tower_groups(
            self.tower, recorded, here.grids, features.shape[:-1], self._counts, self.minimum
        )
