"""LLaVA-1.5 in vLLM: each picture is one square, with positions one after the other."""

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
from atp_patch.integrations.vllm.choosing import keep_features, merge_features, tile_counts
from atp_patch.integrations.vllm.model import FewerPlaceholders, OnePosition
from atp_patch.integrations.vllm.picture import Picture
from atp_patch.integrations.vllm.tower import SquareTower


class PrunedLlavaProcessor(FewerPlaceholders, LlavaMultiModalProcessor):
    """LLaVA's processor with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(OnePosition, LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA-1.5 whose pictures have fewer tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        self.picture = Picture.tiled(1, side, side)
        self.tower: SquareTower | None = None
        if self.settings.reads_tower:
            about = cast("Tower", family_of(self.config).tower(self.config))
            self.tower = SquareTower(self.vision_tower, about, vision.num_hidden_layers)

    def picture_of(self, feature: Any) -> Picture:
        """The one size that all pictures have."""
        return self.picture

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The features that are left of each picture."""
        method, tower = self.settings.method, self.tower
        if tower is None:
            features = super().embed_multimodal(**kwargs)
            pictures = [self.picture] * len(features)
            return self.placed(keep_features(self.settings, list(features), pictures), pictures)
        if isinstance(method, DoorMethod):
            with tower.watched(list(tower.numbers(method).values())):
                features = super().embed_multimodal(**kwargs)
            pictures = [self.picture] * len(features)
            seen = tower.seen_by(method, pictures)
            kept = keep_features(self.settings, list(features), pictures, seen)
            return self.placed(kept, pictures)
        image: Any = self._parse_and_validate_image_input(**kwargs)
        with tower.watched([tower.about.block]):
            states = cast("Tensor", self._process_image_pixels(image))
        pictures = [self.picture] * len(states)
        groups = tower.groups(tower.about.block, tile_counts(self.settings, pictures))
        kept = merge_features(self.settings, groups, states, pictures)
        projected = [
            one._replace(features=self.multi_modal_projector(one.features)) for one in kept
        ]
        return self.placed(projected, pictures)
