"""LLaVA-OneVision in vLLM: a view of the whole picture, then its tiles put together.

A token ends each row behind the view. It belongs to no grid and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import InputProcessingContext

from atp_patch.contract import VisualGrid
from atp_patch.integrations.vllm.choosing import keep_features
from atp_patch.integrations.vllm.model import (
    FewerPlaceholders,
    OnePosition,
    PicturesAlone,
    settings_of,
)
from atp_patch.integrations.vllm.picture import Picture

_MOST_TILES = 9 * 1.1**2  # a picture with more tokens behind the view is scaled down


class PrunedOnevisionInfo(PicturesAlone, LlavaOnevisionProcessingInfo):
    """LLaVA-OneVision's facts."""

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """As many tokens as may stay of a picture, or a few more.

        The tokens that end rows all stay, so that a tall picture may keep more than a larger one.
        """
        config, encoder = self.get_hf_config(), self.get_vision_encoder_info()
        settings, side = settings_of(config), encoder.get_patch_grid_length()
        found = []
        for height, width in config.image_grid_pinpoints:
            rows, columns = (side * (size // encoder.get_image_size()) for size in (height, width))
            tokens = min(rows * columns, int(_MOST_TILES * side**2))
            found.append(rows + settings.count(side**2 + tokens))
        return {"image": max(found)}

    def picture(self, height: int, width: int) -> Picture:
        """How the tokens of a picture of so many pixels lie."""
        encoder = self.get_vision_encoder_info()
        side = encoder.get_patch_grid_length()
        high, wide = get_anyres_image_grid_shape(
            (height, width), self.get_hf_config().image_grid_pinpoints, encoder.get_image_size()
        )
        tokens, rows = self._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=side,
            num_patch_height=high,
            num_patch_width=wide,
        )
        grids = [VisualGrid(0, 1, side, side)]
        if tokens:  # a picture that is too flat or too thin has no columns or no rows
            columns = tokens // rows
            grids.append(VisualGrid(side**2, 1, rows, columns, row_stride=columns + 1))
        return Picture(side**2 + tokens + rows, tuple(grids))


class PrunedOnevisionProcessor(FewerPlaceholders, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's processor with fewer placeholders."""

    info: PrunedOnevisionInfo

    def marks(self, items: Any, number: int) -> int:
        """How many rows of a picture end in a token of their own."""
        size = items.get_items("image", ImageProcessorItems).get_image_size(number)
        picture = self.info.picture(size.height, size.width)
        return picture.length - picture.prunable


@MULTIMODAL_REGISTRY.register_processor(
    PrunedOnevisionProcessor,
    info=PrunedOnevisionInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class PrunedOnevision(OnePosition, LlavaOnevisionForConditionalGeneration, SupportsMRoPE):
    """LLaVA-OneVision whose pictures have fewer tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        context = InputProcessingContext(vllm_config.model_config, tokenizer=None)
        self.info = PrunedOnevisionInfo(context)

    def _picture(self, size: Any) -> Picture:
        height, width = (int(number) for number in size)
        return self.info.picture(height, width)

    def picture_of(self, feature: Any) -> Picture:
        """The picture's view and its tiles, which follow from its size."""
        return self._picture(feature.data["image_sizes"].data)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """The features that are left of each picture."""
        sizes: Any = kwargs["image_sizes"]
        pictures = [self._picture(size) for size in sizes]
        features = list(super().embed_multimodal(**kwargs))
        return self.placed(keep_features(self.settings, features, pictures), pictures)
