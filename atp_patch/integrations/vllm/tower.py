"""Reading the attention of vLLM's towers for square pictures: CLIP, SigLIP and InternVL's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from atp_patch.contract import DoorMethod, TokenGroups, Tower, TowerTokens
from atp_patch.integrations.vllm.picture import Picture
from atp_patch.seam import Recording
from atp_patch.seam.tower.groups import blocks_of, tower_groups
from atp_patch.seam.tower.reading import numbered_block


class SquareTower:
    """A vision tower of vLLM whose pictures are squares, and what family knows of it.

    Args:
        module: vLLM's tower.
        about: where a family finds the parts of the same tower in transformers.
        depth: how many blocks the tower has; vLLM builds no block behind the one that is used.
    """

    def __init__(self, module: nn.Module, about: Tower, depth: int) -> None:
        self.blocks = blocks_of(module, about)
        self.about, self.depth = about, depth
        self._projected: dict[int, tuple[Tensor, Tensor]] = {}
        self._classes: dict[int, Tensor] = {}

    def _attention(self, number: int) -> Any:
        """A block's attention proper, which is given queries, keys and values."""
        return self.blocks[number].get_submodule(self.about.attention).attn

    @contextmanager
    def watched(self, numbers: Sequence[int]) -> Iterator[None]:
        """Note what these blocks do while the context is open."""
        self._projected, self._classes = {}, {}
        handles = []
        for number in sorted(set(numbers)):
            before = partial(self._before_attention, number)
            handles.append(self._attention(number).register_forward_pre_hook(before))
            after = partial(self._after_block, number)
            handles.append(self.blocks[number].register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_attention(self, number: int, module: nn.Module, args: Any) -> None:
        query, key, _ = args
        self._projected[number] = query, key

    def _after_block(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        self._classes[number] = states[:, 0]

    def numbers(self, method: DoorMethod) -> dict[float, int]:
        """The number of each block that a door method asks for, by the number that it gives."""
        return {
            asked: numbered_block(asked, self.about, self.depth) for asked in method.tower_blocks
        }

    def groups(
        self, number: int, counts: tuple[int, ...] | None = None, *, every_query: bool = False
    ) -> TokenGroups:
        """The tokens of the tiles that the tower has just seen, as one block saw them.

        Args:
            number: the number of a block that was watched.
            counts: for each tile, how many tokens stay of it; None where nothing is merged.
            every_query: count the attention of all tokens where the tower has a class token too.
        """
        attention = self._attention(number)
        query, key = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in self._projected[number]
        )
        recording = Recording(query, key, None, attention.scale)
        patches = key.shape[2] - int(self.about.class_token)
        tokens = patches // self.about.cell**2

        def quotas(sizes: Sequence[int], placeholders: Sequence[int]) -> tuple[int, ...] | None:
            return counts

        return tower_groups(
            self.about, [recording], (), (len(key), tokens), quotas, 0, every_query=every_query
        )[0]

    def seen_by(self, method: DoorMethod, pictures: Sequence[Picture]) -> dict[float, TowerTokens]:
        """What the method is to see of the pictures that the tower has just seen.

        Args:
            method: the method.
            pictures: how the tokens of each picture lie; each of its grids is one tile.
        """
        tiles = [len(picture.grids) for picture in pictures]

        def joined(table: Tensor) -> Tensor:  # (tiles, n, *) -> (pictures, V, *)
            parts = [part.flatten(0, 1) for part in table.split(tiles)]
            return pad_sequence(parts, batch_first=True)

        found = {}
        for asked, number in self.numbers(method).items():
            groups = self.groups(number, every_query=method.tower_queries == "all")
            classes = None
            if self.about.class_token:
                one = self._classes[number].float()[:, None]
                classes = joined(one.expand(-1, groups.key.shape[1], -1))
            found[asked] = TowerTokens(joined(groups.attention), joined(groups.key), classes)
        return found
