"""What every pruned model of vLLM has in common: fewer placeholders, and positions that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from atp_patch.integrations.vllm.choosing import Kept
from atp_patch.integrations.vllm.positions import AXES, prompt_positions, split_steps, with_steps
from atp_patch.integrations.vllm.settings import Settings

ATTRIBUTE = "atp_patch"  # of the model's config: the settings as they were written


def settings_of(hf_config: Any) -> Settings:
    """The settings that the plugin has put into a model's config."""
    return Settings.parse(getattr(hf_config, ATTRIBUTE))


class FewerPlaceholders:
    """Put this before a multimodal processor of vLLM: a picture has as many places as stay of it.

    Attributes:
        info: vLLM's facts about the model.
    """

    info: Any

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[PromptUpdate]:
        parent: Any = super()
        settings = settings_of(self.info.get_hf_config())
        return [
            _fewer(update, settings) if update.modality == "image" else update
            for update in parent._get_prompt_updates(*args, **kwargs)
        ]


def _fewer(update: PromptReplacement, settings: Settings) -> PromptReplacement:
    """The same update with as many placeholders as tokens stay."""
    every: Any = update.replacement

    def replacement(item: int) -> list[int]:
        placeholders: list[int] = every(item)
        return placeholders[: settings.count(len(placeholders))]

    return replace(update, replacement=replacement)


class PrunedImages:
    """Put this before a model class of vLLM: its pictures have fewer features, in their places.

    A class that derives from it embeds pictures with :meth:`placed`, and says what positions they
    have by :meth:`grid_of`, :meth:`steps` and :meth:`extent`.

    Attributes:
        settings: the method and the budget.
    """

    settings: Settings

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        parent: Any = super()
        parent.__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = settings_of(vllm_config.model_config.hf_config)
        # Captured graphs read positions where they were when the graph was captured.
        size = vllm_config.scheduler_config.max_num_batched_tokens + 1
        module: Any = self
        for name in ("atp_steps", "atp_positions"):
            table = torch.zeros(AXES, size, dtype=torch.long)
            module.register_buffer(name, table, persistent=False)

    # -- what a class says about its family --------------------------------------------------------

    def grid_of(self, feature: Any) -> tuple[int, int]:
        """Rows and columns of the visual tokens of a picture in a prompt (vLLM's feature)."""
        raise NotImplementedError

    def steps(self, place: Tensor, size: tuple[int, int]) -> Tensor:
        """(m, AXES) int64: how far tokens stand from their picture's first position.

        By default a picture's positions follow one after the other, whatever the row.

        Args:
            place: (m,) int64, places in reading order.
            size: the picture's rows and columns.
        """
        return place[:, None].expand(-1, AXES)

    def extent(self, size: tuple[int, int]) -> int:
        """How many positions a picture takes; by default as many as it has tokens."""
        return size[0] * size[1]

    # -- vLLM's protocols --------------------------------------------------------------------------

    def placed(self, kept: Sequence[Kept], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """What ``embed_multimodal`` returns: for each picture, features with their steps."""
        return tuple(
            with_steps(one.features, self.steps(one.place, size))
            for one, size in zip(kept, sizes, strict=True)
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """The positions of a prompt, as far as they are known before pictures are looked at."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        return prompt_positions(
            len(input_tokens),
            [
                (
                    feature.mm_position.offset,
                    feature.mm_position.length,
                    self.extent(self.grid_of(feature)),
                )
                for feature in features
            ],
        )

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """The embeddings of a step, whose tokens' steps are noted for ``forward``."""
        parent: Any = super()
        steps = self._buffer("atp_steps").zero_()
        embeddings = multimodal_embeddings
        if embeddings is not None and len(embeddings):
            pairs = [split_steps(one) for one in embeddings]
            embeddings = [features for features, _ in pairs]
            assert is_multimodal is not None, "vLLM says which tokens are a picture's"
            place = is_multimodal.nonzero()[:, 0].to(steps.device)
            steps[:, place] = torch.cat([step for _, step in pairs]).T
        return parent.embed_input_ids(input_ids, embeddings, is_multimodal=is_multimodal)

    def true_positions(self, positions: Tensor) -> Tensor:
        """(AXES, n) int64: the positions of a step, with the steps of pictures' tokens."""
        number = positions.shape[-1]
        table = self._buffer("atp_positions")[:, :number]
        return torch.add(positions, self._buffer("atp_steps")[:, :number], out=table)

    def _buffer(self, name: str) -> Tensor:
        table: Tensor = getattr(self, name)
        return table
