"""Reading blocks of a vision tower for methods at the decoder's door, in the tokens' places.

The tower runs before the prompt is read, once for images and once for videos, and for fewer samples
than the decoder gets where beams share their images. Its pictures are matched with the grids of the
prompts by their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from atp_patch.contract import DoorMethod, Layout, TokenGroups, Tower, TowerTokens
from atp_patch.contract.errors import ConfigError, InputError, UnsupportedModelError
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.recorder import Recorder, Recording
from atp_patch.seam.tower.groups import PatchGrid, blocks_of, tower_groups
from atp_patch.seam.tower.packing import Packer, ReadGroup, Repack


@dataclass(frozen=True)
class _TowerCall:
    """One call of the tower and its projector.

    Attributes:
        videos: True where it read videos.
        groups: block -> its tokens in groups, in the places that they have in the prompt.
        widths: block -> how many channels of the groups' tables are attention, key, class token
            and state.
    """

    videos: bool
    groups: dict[int, list[ReadGroup]]
    widths: Mapping[int, tuple[int, ...]]


class _TowerCalls(PerThread):
    """What the hooks know of the tower's calls in the running thread's pass.

    Attributes:
        grids: those of all pictures, where the tower takes pictures of any size.
        recorded: block -> the attention that was recorded in the call that is under way.
        classes: block -> (G, Dt) the class tokens of the call that is under way.
        states: block -> (G, n, Dt) its output at each token, as far as the method asks for it.
        calls: the calls that have ended.
        unpacked: the last of them, until the host has packed its features.
    """

    def __init__(self) -> None:
        self.grids: list[PatchGrid] = []
        self.recorded: dict[int, list[Recording]] = {}
        self.classes: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.calls: list[_TowerCall] = []
        self.unpacked: _TowerCall | None = None


class ReadingHooks:
    """Hooks on a vision tower that read its blocks and change nothing.

    Args:
        base: the model without its head.
        tower: where the tower's parts are.
        method: the door method, which names the blocks and whose attention counts in them.
        active: tells whether this call of the tower is part of a pass that may be pruned.
        recorder: records the tower's attention.
        videos: tells whether videos are being read.

    Raises:
        ConfigError: where the tower has no such block.
        UnsupportedModelError: where the block does not attend to whole pictures.
    """

    def __init__(
        self,
        base: Any,
        tower: Tower,
        method: DoorMethod,
        active: Callable[[], bool],
        recorder: Recorder,
        videos: Callable[[], bool],
    ) -> None:
        self.base, self.tower, self.active = base, tower, active
        self.recorder, self.videos = recorder, videos
        self._here = _TowerCalls()
        depth = min(len(blocks_of(module, tower)) for module in self._towers())
        self.blocks = {
            number: numbered_block(number, tower, depth) for number in method.tower_blocks
        }
        self.every_query = method.tower_queries == "all"
        self.keeps_states = method.text_encoder is not None
        self._packers = [Packer(base, name, self._after_packing) for name in tower.packers]

    def install(self, add: Callable[[Any], None]) -> None:
        """Register the hooks; ``add`` takes their handles."""
        for tower in self._towers():
            if self.tower.packed or self.tower.sizes:
                add(tower.register_forward_pre_hook(self._before_tower, with_kwargs=True))
            for number, block, attention in self._watched(tower):
                self.recorder.watch(attention)
                before = partial(self._before_attention, number)
                add(attention.register_forward_pre_hook(before))
                add(attention.register_forward_hook(self._after_attention, always_call=True))
                if self.tower.class_token:
                    add(block.register_forward_hook(partial(self._after_block, number)))
        projector = self.base.get_submodule(self.tower.projector)
        add(projector.register_forward_hook(self._after_projector))
        for packer in self._packers:
            packer.install()

    def remove(self) -> None:
        """Give the towers' attention its own config back, and the base model its methods."""
        for packer in self._packers:
            packer.remove()
        for tower in self._towers():
            for _, _, attention in self._watched(tower):
                self.recorder.release(attention)

    def forget(self) -> None:
        """Forget what the running thread's last pass has left."""
        here = self._here
        here.recorded, here.classes, here.states = {}, {}, {}
        here.calls, here.unpacked = [], None

    def _towers(self) -> list[nn.Module]:
        return [self.base.get_submodule(name) for name in self.tower.modules]

    def _watched(self, tower: nn.Module) -> Iterator[tuple[int, Any, Any]]:
        """Return the number, the module and the attention of each block that is read."""
        blocks = blocks_of(tower, self.tower)
        for number in sorted(set(self.blocks.values())):
            yield number, blocks[number], blocks[number].get_submodule(self.tower.attention)

    # -- hooks ------------------------------------------------------------------------------------

    def _before_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        about = self.tower
        if about.sizes:
            self._here.grids = self._sized(args, kwargs)
            return
        # PaddleOCR-VL's tower calls them image_grid_thw in early versions of transformers.
        named = [kwargs[name] for name in ("grid_thw", "image_grid_thw") if name in kwargs]
        grids = (named[0] if named else args[1]).tolist()
        cells = kwargs[about.cells].tolist() if about.cells else [about.cell] * len(grids)
        self._here.grids = [
            PatchGrid(t, h, w, cell) for (t, h, w), cell in zip(grids, cells, strict=True)
        ]

    def _sized(self, args: Any, kwargs: dict[str, Any]) -> list[PatchGrid]:
        """Return the grids of pictures whose sizes the tower is told; without them all are as large
        as the pixel values.
        """
        about, sizes = self.tower, kwargs.get(self.tower.sizes)
        if sizes is None:
            pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
            sizes = [pixels.shape[-2:]] * len(pixels)
        elif isinstance(sizes, Tensor) and sizes.dim() == 3:  # each patch's column and row
            sizes = (sizes.amax(1) + 1).flip(-1).tolist()
        step = about.sizes_step
        return [
            PatchGrid(1, int(height) // step, int(width) // step, about.cell)
            for height, width in sizes
        ]

    def _before_attention(self, number: int, module: nn.Module, args: Any) -> None:
        if self.active():
            self._here.recorded[number] = []
            self.recorder.expect(module, self._here.recorded[number].append, every=True)

    def _after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.forget()

    def _after_block(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        if number in self._here.recorded:
            states = output[0] if isinstance(output, tuple) else output
            if self.tower.class_last:
                states = states.roll(1, 1)
            self._here.classes[number] = states[:, 0].detach()
            if self.keeps_states:
                self._here.states[number] = states[:, 1:].detach()

    def _after_projector(self, module: nn.Module, args: Any, output: Tensor) -> None:
        here = self._here
        here.unpacked = None
        if not here.recorded:
            return
        features = args[0] if self.tower.tokenwise else output
        groups, widths = {}, {}
        for number, recorded in here.recorded.items():
            made, _ = tower_groups(
                self.tower,
                recorded,
                here.grids,
                features.shape[:-1],
                _no_counts,
                0,
                every_query=self.every_query,
            )
            per_group = [table.get(number) for table in (here.classes, here.states)]
            groups[number] = list(_groups(made, *per_group))
            widths[number] = (
                1,
                made.key.shape[-1],
                *(0 if table is None else table.shape[-1] for table in per_group),
            )
        here.unpacked = _TowerCall(self.videos(), groups, widths)
        here.calls.append(here.unpacked)
        here.recorded, here.classes, here.states = {}, {}, {}

    def _after_packing(self, repack: Repack) -> None:
        call, self._here.unpacked = self._here.unpacked, None
        if call is not None:
            for number, groups in call.groups.items():
                call.groups[number] = repack(groups)

    # -- places -----------------------------------------------------------------------------------

    def read(self, layout: Layout, videos: Sequence[Sequence[bool]]) -> dict[float, TowerTokens]:
        """Return what each block did, in the layout's places, by the number that the method asked
        for.

        Args:
            layout: where the visual tokens lie.
            videos: for each grid of each sample, whether it is a video.

        Raises:
            InputError: where the tower has not run for these images.
        """
        calls, self._here.calls = self._here.calls, []
        made = {number: _placed(calls, number, layout, videos) for number in self.blocks.values()}
        return {asked: made[number] for asked, number in self.blocks.items()}


def _no_counts(tokens: Sequence[int], placeholders: Sequence[int]) -> None:
    """Return None, since the budget of a method at the door is not divided among groups."""


def numbered_block(number: float, tower: Tower, depth: int) -> int:
    """Return the number from the front of the block that a door method names.

    Args:
        number: a member of :attr:`DoorMethod.tower_blocks`.
        tower: where the tower's parts are.
        depth: how many blocks the tower has.

    Raises:
        ConfigError: where the tower has no such block.
        UnsupportedModelError: where the block does not attend to whole pictures.
    """
    if 0 < number < 1:
        able = tower.full_blocks or range(tower.block + 1)
        wanted = round(number * depth) - 1
        return min(sorted(able, reverse=True), key=lambda block: abs(block - wanted))
    block = int(number if number >= 0 else tower.block + 1 + number)
    if not 0 <= block < depth:
        raise ConfigError(
            f"tower_blocks: there is no block {number} in a tower of {depth} blocks whose block "
            f"{tower.block} makes the features; -1 names that one, and -{tower.block + 1} the "
            "first."
        )
    if tower.full_blocks and block not in tower.full_blocks:
        raise UnsupportedModelError(
            f"tower_blocks: block {number} attends within windows or not at all, which says little "
            f"about whole pictures; of this tower ask for a block among {list(tower.full_blocks)}."
        )
    return block


def _groups(
    made: TokenGroups, classes: Tensor | None, states: Tensor | None
) -> Iterator[ReadGroup]:
    """Return the groups of one call of the tower, as one block made them.

    Args:
        made: the tokens with the attention that they got.
        classes: (G, Dt) the class token of each group, if there is one.
        states: (G, n, Dt) the output at each token, where it is asked for.
    """
    for number, size in enumerate(zip(made.heights, made.widths, strict=True)):
        valid = made.valid[number]
        place = (made.row[number] * size[1] + made.column[number])[valid]
        parts = [made.attention[number][valid][:, None], made.key[number][valid]]
        if classes is not None:
            parts.append(classes[number].float().to(place.device).expand(len(place), -1))
        if states is not None:
            parts.append(states[number].float().to(place.device))
        table = torch.cat(parts, dim=1)
        yield ReadGroup(size, torch.empty_like(table).index_copy_(0, place, table))


def _placed(
    calls: Sequence[_TowerCall], block: int, layout: Layout, videos: Sequence[Sequence[bool]]
) -> TowerTokens:
    """Return the groups of one block, in the layout's places."""
    groups = {
        kind: [group for call in calls if call.videos == kind for group in call.groups[block]]
        for kind in (False, True)
    }
    every = groups[False] + groups[True]
    needed = sum(grid.frames for sample in layout.grids for grid in sample)
    repeats = needed // max(len(every), 1)  # beams and returned sequences share their images
    if repeats == 0 or len(every) * repeats != needed or len(layout.grids) % repeats:
        raise InputError(
            f"the vision tower ran for {len(every)} images, tiles or frames, and the prompt holds "
            f"{needed}; a method that reads the tower needs the pixel values of its images in the "
            "same call."
        )
    rows: list[Tensor] = []
    left = {kind: iter(found) for kind, found in groups.items()}
    for number, (grids, kinds) in enumerate(zip(layout.grids, videos, strict=True)):
        if number % repeats:
            rows.append(rows[-1])
            continue
        parts = [every[0].table[:0]]
        for grid, kind in zip(grids, kinds, strict=True):
            for _ in range(grid.frames):
                group = next(left[kind], None)
                if group is None or group.size != (grid.height, grid.width):
                    raise InputError(
                        f"sample {number} has a grid of {grid.height} x {grid.width} visual "
                        "tokens in a place where the vision tower made "
                        f"{'nothing' if group is None else group.size}; give the images in the "
                        "order of their places in the prompts, and no frames from which a "
                        "processor has dropped tokens."
                    )
                parts.append(group.table)
        rows.append(torch.cat(parts))
    table = pad_sequence(rows, batch_first=True).to(layout.position.device)
    attention, key, class_token, states = table.split(calls[0].widths[block], dim=-1)
    return TowerTokens(
        attention[..., 0],
        key,
        class_token if class_token.shape[-1] else None,
        states if states.shape[-1] else None,
    )
