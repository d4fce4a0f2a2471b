"""What every pruned model of vLLM has in common: fewer placeholders, and positions that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from atp_patch.integrations.vllm.choosing import Kept
from atp_patch.integrations.vllm.picture import Picture
from atp_patch.integrations.vllm.positions import AXES, prompt_positions, split_steps, with_steps
from atp_patch.integrations.vllm.settings import Settings

ATTRIBUTE = "atp_patch"  # of the model's config: the settings as they were written


def settings_of(hf_config: Any) -> Settings:
    """The settings that the plugin has put into a model's config."""
    return Settings.parse(getattr(hf_config, ATTRIBUTE))


class PicturesAlone:
    """Put this before vLLM's facts about a model: it takes pictures, and no videos."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of pictures."""
        return {"image": None, "video": 0}


class FewerPlaceholders:
    """Put this before a multimodal processor of vLLM: a picture has as many places as stay of it.

    Attributes:
        info: vLLM's facts about the model.
    """

    info: Any

    def marks(self, items: Any, number: int) -> int:
        """How many tokens of a picture belong to no grid, and stay.

        Args:
            items: vLLM's multimodal items of a prompt.
            number: the number of the picture among them.
        """
        return 0

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **kwargs: Any) -> Sequence[Any]:
        parent: Any = super()
        return [
            self._fewer(update, mm_items) if update.modality == "image" else update
            for update in parent._get_prompt_updates(mm_items, *args, **kwargs)
        ]

    def _fewer(self, update: PromptReplacement, items: Any) -> PromptUpdate:
        """The same update with as many placeholders as tokens stay."""
        settings = settings_of(self.info.get_hf_config())
        every: Any = update.replacement

        def replacement(number: int) -> list[int] | PromptUpdateDetails:
            content: list[int] | PromptUpdateDetails = every(number)
            tokens = content if isinstance(content, list) else content.full
            placeholder = list(range(len(tokens)))
            if isinstance(content, PromptUpdateDetails) and content.is_embed is not None:
                placeholder = content.is_embed(tokens).nonzero()[:, 0].tolist()
            marks = self.marks(items, number)
            stay = marks + settings.count(len(placeholder) - marks)
            gone = set(placeholder[stay:])
            left = [token for place, token in enumerate(tokens) if place not in gone]
            return left if isinstance(content, list) else replace(content, full=left)

        return replace(update, replacement=replacement)


class PrunedImages:
    """Put this before a model class of vLLM: its pictures have fewer features, in their places.

    A class that derives from it embeds pictures with :meth:`placed`, and says what positions they
    have by :meth:`picture_of`, :meth:`steps` and :meth:`extent`.

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

    def picture_of(self, feature: Any) -> Picture:
        """How the visual tokens of a picture in a prompt (vLLM's feature) lie."""
        raise NotImplementedError

    def steps(self, place: Tensor, picture: Picture) -> Tensor:
        """(m, AXES) int64: how far tokens stand from their picture's first position.

        By default a picture's positions follow one after the other, whatever the row.

        Args:
            place: (m,) int64, places among the picture's tokens.
            picture: how these lie.
        """
        return place[:, None].expand(-1, AXES)

    def extent(self, picture: Picture) -> int:
        """How many positions a picture takes; by default as many as it has tokens."""
        return picture.length

    # -- vLLM's protocols --------------------------------------------------------------------------

    def placed(self, kept: Sequence[Kept], pictures: Sequence[Picture]) -> tuple[Tensor, ...]:
        """What ``embed_multimodal`` returns: for each picture, features with their steps."""
        return tuple(
            with_steps(one.features, self.steps(one.place, picture))
            for one, picture in zip(kept, pictures, strict=True)
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """The positions of a prompt, as far as they are known before pictures are looked at."""
        found = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            # The range of a picture may hold further tokens, such as one that begins it.
            ((first, last),) = feature.mm_position.extract_embeds_range()
            found.append((first, last - first + 1, self.extent(self.picture_of(feature))))
        return prompt_positions(len(input_tokens), found)

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


class OnePosition(PrunedImages):
    """Put this before a model class of vLLM whose tokens have one position each.

    vLLM knows no positions but 0, 1, 2, ... in models without M-RoPE. Such a model therefore has
    M-RoPE for vLLM (it derives from ``SupportsMRoPE`` too), with three equal positions for each
    token, of which its decoder gets one.
    """

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the decoder, which is given one position for each token."""
        parent: Any = super()
        position = self.true_positions(positions)[0]
        return parent.forward(input_ids, position, intermediate_tensors, inputs_embeds, **kwargs)
