"""InternVL in vLLM: a picture is one square tile, or several and a small view of the whole."""

from __future__ import annotations

from typing import Any, cast

import torch
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from atp_patch.contract import DoorMethod, Tower
from atp_patch.families import family_of
from atp_patch.integrations.vllm.choosing import keep_features, merge_features, tile_counts
from atp_patch.integrations.vllm.model import FewerPlaceholders, OnePosition, PicturesAlone
from atp_patch.integrations.vllm.picture import Picture
from atp_patch.integrations.vllm.tower import SquareTower


class PrunedInternVLInfo(PicturesAlone, InternS1ProcessingInfo):
    """InternVL's facts."""


class PrunedInternVLProcessor(FewerPlaceholders, InternS1MultiModalProcessor):
    """InternVL's processor with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor, info=PrunedInternVLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class PrunedInternVL(OnePosition, InternS1ForConditionalGeneration, SupportsMRoPE):
    """InternVL whose pictures have fewer tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = self.config.vision_config
        patches = vision.image_size[0] // vision.patch_size[0]
        self.side = round(patches * self.config.downsample_ratio)
        self.tower: SquareTower | None = None
        if self.settings.reads_tower:
            about = cast("Tower", family_of(self.config).tower(self.config))
            self.tower = SquareTower(self.vision_tower, about, vision.num_hidden_layers)

    def _picture(self, tiles: Any) -> Picture:
        return Picture.tiled(int(tiles), self.side, self.side)

    def picture_of(self, feature: Any) -> Picture:
        """The picture's tiles, whose number its processor has found."""
        return self._picture(feature.data["image_num_patches"].data)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The features that are left of each picture."""
        numbers: Any = kwargs["image_num_patches"]
        pictures = [self._picture(tiles) for tiles in numbers]
        settings, method, tower = self.settings, self.settings.method, self.tower
        if tower is None:
            features = list(super().embed_multimodal(**kwargs))
            return self.placed(keep_features(settings, features, pictures), pictures)
        if isinstance(method, DoorMethod):
            with tower.watched(list(tower.numbers(method).values())):
                features = list(super().embed_multimodal(**kwargs))
            seen = tower.seen_by(method, pictures)
            return self.placed(keep_features(settings, features, pictures, seen), pictures)
        with tower.watched([tower.about.block]):
            features = list(super().embed_multimodal(**kwargs))
        groups = tower.groups(tower.about.block, tile_counts(settings, pictures))
        # The projector joins patches, so that its outputs are merged.
        tiles = torch.cat(features).unflatten(0, (-1, self.side**2))
        return self.placed(merge_features(settings, groups, tiles, pictures), pictures)
