"""LLaVA-1.5 in vLLM: each picture is one square, with positions one after the other.

vLLM knows no positions but 0, 1, 2, ... in models without M-RoPE. This one therefore has M-RoPE for
vLLM, with three equal positions for each token, of which its decoder gets one.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from atp_patch.contract import DoorMethod, Tower
from atp_patch.families import family_of
from atp_patch.integrations.vllm.choosing import keep_features, merge_features
from atp_patch.integrations.vllm.model import FewerPlaceholders, PrunedImages
from atp_patch.integrations.vllm.tower import SquareTower


class PrunedLlavaProcessor(FewerPlaceholders, LlavaMultiModalProcessor):
    """LLaVA's processor with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(PrunedImages, LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA-1.5 whose pictures have fewer tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        self.size = (side, side)
        self.tower: SquareTower | None = None
        if self.settings.reads_tower:
            about = cast("Tower", family_of(self.config).tower(self.config))
            self.tower = SquareTower(self.vision_tower, about, vision.num_hidden_layers)

    def grid_of(self, feature: Any) -> tuple[int, int]:
        """The one size that all pictures have."""
        return self.size

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The features that are left of each picture."""
        method, tower = self.settings.method, self.tower
        if tower is None:
            features = super().embed_multimodal(**kwargs)
            sizes = [self.size] * len(features)
            return self.placed(keep_features(self.settings, list(features), sizes), sizes)
        if isinstance(method, DoorMethod):
            with tower.watched(list(tower.numbers(method).values())):
                features = super().embed_multimodal(**kwargs)
            sizes = [self.size] * len(features)
            seen = tower.seen_by(method)
            return self.placed(keep_features(self.settings, list(features), sizes, seen), sizes)
        image: Any = self._parse_and_validate_image_input(**kwargs)
        with tower.watched([tower.about.block]):
            states = cast("Tensor", self._process_image_pixels(image))
        sizes = [self.size] * len(states)
        groups = tower.groups(tower.about.block, self.settings.count)
        kept = merge_features(self.settings, groups, states)
        projected = [
            one._replace(features=self.multi_modal_projector(one.features)) for one in kept
        ]
        return self.placed(projected, sizes)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the decoder, which is given one position for each token."""
        position = self.true_positions(positions)[0]
        return super().forward(input_ids, position, intermediate_tensors, inputs_embeds, **kwargs)
