"""Reading the attention of vLLM's CLIP and SigLIP towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from atp_patch.contract import DoorMethod, TokenGroups, Tower, TowerTokens
from atp_patch.seam import Recording
from atp_patch.seam.tower.groups import tower_groups
from atp_patch.seam.tower.reading import numbered_block


class SquareTower:
    """A vision tower of vLLM whose pictures are squares, and what family knows of it.

    Args:
        module: vLLM's ``CLIPVisionModel`` or ``SiglipVisionModel``.
        about: where a family finds the parts of the same tower in transformers.
        depth: how many blocks the tower has; vLLM builds no block behind the one that is used.
    """

    def __init__(self, module: nn.Module, about: Tower, depth: int) -> None:
        inner: Any = module
        self.blocks: Any = inner.vision_model.encoder.layers
        self.about, self.depth = about, depth
        self._projected: dict[int, Tensor] = {}
        self._classes: dict[int, Tensor] = {}

    @contextmanager
    def watched(self, numbers: Sequence[int]) -> Iterator[None]:
        """Note what these blocks do while the context is open."""
        self._projected, self._classes = {}, {}
        handles = []
        for number in sorted(set(numbers)):
            block = self.blocks[number]
            project = block.self_attn.qkv_proj
            handles.append(project.register_forward_hook(partial(self._after_projection, number)))
            handles.append(block.register_forward_hook(partial(self._after_block, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_projection(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        self._projected[number] = output[0]

    def _after_block(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        self._classes[number] = states[:, 0]

    def numbers(self, method: DoorMethod) -> dict[float, int]:
        """The number of each block that a door method asks for, by the number that it gives."""
        return {
            asked: numbered_block(asked, self.about, self.depth) for asked in method.tower_blocks
        }

    def groups(
        self,
        number: int,
        counts: Callable[[int], int] | None = None,
        *,
        every_query: bool = False,
    ) -> TokenGroups:
        """The tokens of the pictures that the tower has just seen, as one block saw them.

        Args:
            number: the number of a block that was watched.
            counts: how many tokens stay of so many; None where nothing is merged.
            every_query: count the attention of all tokens where the tower has a class token too.
        """
        made, attention = self._projected[number], self.blocks[number].self_attn
        query, key, _ = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in made.chunk(3, dim=-1)
        )
        recording = Recording(query, key, None, attention.scale)
        tokens = key.shape[2] - int(self.about.class_token)

        def quotas(sizes: Sequence[int], placeholders: Sequence[int]) -> tuple[int, ...] | None:
            return None if counts is None else tuple(map(counts, sizes))

        return tower_groups(
            self.about, [recording], (), (len(key), tokens), quotas, 0, every_query=every_query
        )[0]

    def seen_by(self, method: DoorMethod) -> dict[float, TowerTokens]:
        """What the method is to see of the pictures that the tower has just seen."""
        found = {}
        for asked, number in self.numbers(method).items():
            groups = self.groups(number, every_query=method.tower_queries == "all")
            classes = None
            if self.about.class_token:
                classes = self._classes[number].float()[:, None].expand(-1, groups.key.shape[1], -1)
            found[asked] = TowerTokens(groups.attention, groups.key, classes)
        return found
