"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM: pictures of any size, positions by row and column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from atp_patch.integrations.vllm.choosing import keep_features
from atp_patch.integrations.vllm.model import (
    FewerPlaceholders,
    PicturesAlone,
    PrunedImages,
    settings_of,
)
from atp_patch.integrations.vllm.picture import Picture


class _GridInfo(PicturesAlone):
    """Put this before the facts of a Qwen-VL."""

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """The most tokens that stay of a picture."""
        info: Any = self
        settings = settings_of(info.get_hf_config())
        return {"image": settings.count(info.get_max_image_tokens())}


class _GridPictures(PrunedImages):
    """Put this before a Qwen-VL: tokens have a row and a column, and so have their positions."""

    config: Any

    def _picture(self, grid: Any) -> Picture:
        cell = self.config.vision_config.spatial_merge_size
        _, height, width = (int(number) for number in grid)
        return Picture.tiled(1, height // cell, width // cell)

    def picture_of(self, feature: Any) -> Picture:
        """The picture's one grid, which its processor has found."""
        return self._picture(feature.data["image_grid_thw"].data)

    def steps(self, place: Tensor, picture: Picture) -> Tensor:
        """The row and the column; a picture is one moment of time."""
        width = picture.grids[0].width
        return torch.stack([torch.zeros_like(place), place // width, place % width], dim=1)

    def extent(self, picture: Picture) -> int:
        """As many positions as the longer side has tokens."""
        return max(picture.grids[0].height, picture.grids[0].width)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The features that are left of each picture."""
        parent: Any = super()
        grids: Any = kwargs["image_grid_thw"]
        features = parent.embed_multimodal(**kwargs)
        pictures = [self._picture(grid) for grid in grids]
        # Behind a feature stand those that Qwen3-VL adds in later layers (deepstack).
        width = self.config.get_text_config().hidden_size
        kept = keep_features(self.settings, features, pictures, width=width)
        return self.placed(kept, pictures)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the decoder with the positions of the tokens that are left."""
        parent: Any = super()
        true = self.true_positions(positions)
        return parent.forward(input_ids, true, intermediate_tensors, inputs_embeds, **kwargs)

    def get_encoder_cudagraph_config(self) -> Any:
        """Capture graphs of the tower for no modality: they would go around the choice."""
        parent: Any = super()
        config = parent.get_encoder_cudagraph_config()
        return replace(config, modalities=[])


class PrunedQwen2VLInfo(_GridInfo, Qwen2VLProcessingInfo):
    """Qwen2-VL's facts."""


class PrunedQwen2VLProcessor(FewerPlaceholders, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's processor with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor, info=PrunedQwen2VLInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VL(_GridPictures, Qwen2VLForConditionalGeneration):
    """Qwen2-VL whose pictures have fewer tokens."""


class PrunedQwen25VLInfo(_GridInfo, Qwen2_5_VLProcessingInfo):
    """Qwen2.5-VL's facts."""


class PrunedQwen25VLProcessor(FewerPlaceholders, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's processor with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen25VLProcessor, info=PrunedQwen25VLInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen25VL(_GridPictures, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose pictures have fewer tokens."""


class PrunedQwen3VLInfo(_GridInfo, Qwen3VLProcessingInfo):
    """Qwen3-VL's facts."""


class PrunedQwen3VLProcessor(FewerPlaceholders, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=PrunedQwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(_GridPictures, Qwen3VLForConditionalGeneration):
    """Qwen3-VL whose pictures have fewer tokens."""
