"""Giving the vision tower smaller pictures, and spreading its tokens over the placeholders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from atp_patch.contract import Quota, Tower
from atp_patch.contract.errors import InputError
from atp_patch.seam.door.tombstones import with_tombstones
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.tower.merging import QuotaRule

Size = tuple[int, int]


class GridChooser(Protocol):
    """Chooses the grid that a larger one becomes, of about ``count`` and >= ``minimum`` tokens."""

    def __call__(self, height: int, width: int, count: int, minimum: int, *, square: bool) -> Size:
        """Return (height, width) of the smaller grid."""


class _Shrinking(PerThread):
    """What the hooks know of the tower's run in the running thread.

    Attributes:
        sizes: for each grid its size before and after; empty where nothing became smaller.
        lead: how many tokens stand in front of each grid.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[Size, Size]] = []
        self.lead = 0


class ShrinkHooks:
    """Hooks that give a vision tower smaller pictures and spread its tokens over placeholders.

    Args:
        base: the model without its head.
        tower: where the tower's parts are.
        grid: the method's choice of the smaller grid.
        quotas: the budget.
        active: tells whether this call of the tower is part of a pass that may be pruned.
    """

    def __init__(
        self,
        base: Any,
        tower: Tower,
        grid: GridChooser,
        quotas: QuotaRule,
        active: Callable[[], bool],
    ) -> None:
        self.base, self.tower, self.grid, self.quotas = base, tower, grid, quotas
        self.active = active
        self._here = _Shrinking()

    def install(self, add: Callable[[Any], None]) -> None:
        """Register the hooks; ``add`` takes their handles."""
        for name, lead in zip(self.tower.modules, self.tower.lead, strict=True):
            tower = self.base.get_submodule(name)
            before = self._before_packed if self.tower.packed else _Before(self, lead)
            add(tower.register_forward_pre_hook(before, with_kwargs=True))
            if self.tower.packed:
                add(tower.register_forward_hook(self._after_packed))
        if not self.tower.packed:
            projector = self.base.get_submodule(self.tower.projector)
            add(projector.register_forward_hook(self._after_projector))

    def remove(self) -> None:
        """Do nothing, since ``install`` has registered only hooks."""

    def forget(self) -> None:
        """Forget what the running thread's last pass has left."""
        self._here.sizes = []

    # -- towers that get pictures -----------------------------------------------------------------

    def shrink(self, pixels: Tensor, lead: int) -> Tensor:
        """Return smaller pictures, or the same ones where nothing changes.

        Args:
            pixels: (N, 3, H, W) pictures of one size.
            lead: how many tokens stand in front of each grid.
        """
        self._here.sizes, self._here.lead = [], lead
        step = self.tower.patch * self.tower.cell
        number, height, width = pixels.shape[0], pixels.shape[2] // step, pixels.shape[3] // step
        tokens = height * width
        found = self._quotas([tokens] * number, [tokens + lead] * number)
        if len(set(found)) > 1:
            counts = sorted({quota.tokens for quota in found})
            raise InputError(
                f"the images of one batch would get {counts} tokens, but the tower "
                "takes pictures of one size at a time; give keep=, or samples with as many images."
            )
        small = self.grid(height, width, *found[0], square=self.tower.square)
        if small == (height, width):
            return pixels
        self._here.sizes = [((height, width), small)] * number
        return _resized(pixels, small[0] * step, small[1] * step)

    def _after_projector(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self._here.sizes:
            return None
        lead, sizes, self._here.sizes = self._here.lead, self._here.sizes, []
        features = output[:, lead:].flatten(0, 1)
        spread = _spread(features, sizes).unflatten(0, (len(sizes), -1))
        return torch.cat([output[:, :lead], spread], dim=1)

    # -- towers that get rows of patches ----------------------------------------------------------

    def _before_packed(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.forget()
        if not self.active():
            return None
        names = ("hidden_states", "grid_thw")
        patches, grids = (
            {**dict(zip(names, args, strict=False)), **kwargs}[name] for name in names
        )
        cell = self.tower.cell
        films = [(t, h // cell, w // cell) for t, h, w in grids.tolist()]
        tokens = [t * h * w for t, h, w in films]
        small = [
            self.grid(h, w, max(round(count / t), 1), -(-minimum // t), square=False)
            for (t, h, w), (count, minimum) in zip(films, self._quotas(tokens, tokens), strict=True)
        ]
        if all(size == film[1:] for size, film in zip(small, films, strict=True)):
            return None
        parts, made = patches.split([n * cell**2 for n in tokens]), []
        for part, (t, h, w), size in zip(parts, films, small, strict=True):
            self._here.sizes += [((h, w), size)] * t
            made.append(part if size == (h, w) else self._repatched(part, (t, h, w), size))
        grid = [[t, h * cell, w * cell] for (t, _, _), (h, w) in zip(films, small, strict=True)]
        replaced = {"hidden_states": torch.cat(made), "grid_thw": grids.new_tensor(grid)}
        return (), {**kwargs, **replaced}

    def _repatched(self, patches: Tensor, film: tuple[int, int, int], size: Size) -> Tensor:
        """Turn the patches (patches, C * frames * p * p) of one image or video into those of its
        smaller pictures.
        """
        cell, side, frames = self.tower.cell, self.tower.patch, self.tower.frames
        t, h, w = film
        # The dimensions: time, row and column of cells; row and column in the cell; channel, frame,
        # row and column in the patch.
        table = patches.reshape(t, h, w, cell, cell, -1, frames, side, side)
        channels = table.shape[5]
        pictures = table.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        pictures = pictures.reshape(t * frames, channels, h * cell * side, w * cell * side)
        small = _resized(pictures, size[0] * cell * side, size[1] * cell * side)
        table = small.reshape(t, frames, channels, size[0], cell, side, size[1], cell, side)
        return table.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, patches.shape[1])

    def _after_packed(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._here.sizes:
            return None
        sizes, self._here.sizes = self._here.sizes, []
        output.pooler_output = _spread(output.pooler_output, sizes)
        return output

    def _quotas(self, tokens: Sequence[int], placeholders: Sequence[int]) -> tuple[Quota, ...]:
        quotas = self.quotas(tokens, placeholders)
        assert quotas is not None, "a method that shrinks pictures has a budget"
        return quotas


class _Before:
    """The forward pre-hook of a tower that takes pictures."""

    def __init__(self, hooks: ShrinkHooks, lead: int) -> None:
        self.hooks, self.lead = hooks, lead

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Shrink the pictures, and tell the tower to fit its position embeddings to them."""
        self.hooks.forget()
        if not self.hooks.active():
            return None
        pixels = args[0] if args else kwargs["pixel_values"]
        small = self.hooks.shrink(pixels, self.lead)
        if small is pixels:
            return None
        keyword = self.hooks.tower.resized
        kwargs = {**kwargs, **({keyword: True} if keyword else {})}
        if args:
            return (small, *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": small}


def spread_slots(grid: Size, small: Size) -> Tensor:
    """Return (rows * columns of ``small``,) int64: the place in ``grid`` under the centre of each
    place of ``small``.

    These are distinct, because a smaller grid never has two centres in one place of the larger one.
    """
    rows, columns = (
        (2 * torch.arange(few) + 1) * many // (2 * few)
        for few, many in zip(small, grid, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).flatten()


def _spread(features: Tensor, sizes: Sequence[tuple[Size, Size]]) -> Tensor:
    """Return the features (tokens of the smaller grids, D) as (tokens of all grids, D).

    The other places hold tombstones.
    """
    places, parities = [], []
    start = 0
    for grid, small in sizes:
        places.append(start + spread_slots(grid, small))
        place = torch.arange(grid[0] * grid[1])
        parities.append(place // grid[1] + place % grid[1])
        start += len(place)
    kept = torch.cat(places).to(features.device)
    parity = torch.cat(parities).to(features.device)
    wide = features.new_zeros(start, features.shape[1]).index_put((kept,), features)
    gone = torch.ones(start, dtype=torch.bool, device=features.device).index_fill(0, kept, False)
    return with_tombstones(wide, gone.nonzero().flatten(), parity[gone])


def _resized(pictures: Tensor, height: int, width: int) -> Tensor:
    """Return (N, C, H, W) pictures resampled by a bilinear filter that is widened against
    aliasing.
    """
    small = interpolate(pictures.float(), (height, width), mode="bilinear", antialias=True)
    return small.to(pictures.dtype)
