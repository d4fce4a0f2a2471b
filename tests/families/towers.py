"""LLaVA with other towers: CLIP with several layers read, Pixtral; Mistral 3; Video-LLaVA."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Kind, Paint, stacked
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

TILE, PATCH, SIDE = 48, 8, 6
BREAK, END = 6, 7
FRAMES = 3


def _clip(make: Any, **more: Any) -> Any:
    return make(
        vision_config=CLIPVisionConfig(**TOWER, image_size=TILE, patch_size=PATCH),
        text_config=LlamaConfig(**TEXT),
        image_token_index=tiny.IMAGE,
        pad_token_id=tiny.PAD,
        **more,
    )


def _square(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    drawn = Drawn(tensors={"pixel_values": paint(TILE, TILE)[None]})
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    return drawn


def _square_or_video(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    if which != VIDEO:
        return _square(config, which, paint, count)
    drawn = Drawn(tensors={"frames": torch.stack([paint(TILE, TILE) for _ in range(FRAMES)])})
    for frame in range(FRAMES):
        drawn.mark(tiny.VIDEO)  # the class token of each frame stays
        drawn.square(tiny.VIDEO, 0, SIDE, SIDE, frame)
    return drawn


def _images_and_videos(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    every = [picture.tensors for row in pictures for picture in row]
    images = [tensors["pixel_values"] for tensors in every if "pixel_values" in tensors]
    videos = [tensors["frames"] for tensors in every if "frames" in tensors]
    takes = signature(VideoLlavaForConditionalGeneration.forward).parameters
    name = "pixel_values_images" if "pixel_values_images" in takes else "pixel_values"
    made = {name: torch.cat(images)} if images else {}
    return {**made, "pixel_values_videos": torch.stack(videos)} if videos else made


def _pixtral_tower() -> PixtralVisionConfig:
    return PixtralVisionConfig(**TOWER, image_size=64, patch_size=4, head_dim=16)


def _vipllava() -> VipLlavaConfig:
    layers = [name for name in vars(VipLlavaConfig()) if name.startswith("vision_feature_layer")]
    return _clip(VipLlavaConfig, **{key: [-1, -2] for key in layers})


def _mistral3() -> Mistral3Config:
    return Mistral3Config(
        vision_config=_pixtral_tower(),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_index=tiny.IMAGE,
        spatial_merge_size=2,
    )


def _pixtral_llava() -> LlavaConfig:
    return LlavaConfig(
        vision_config=_pixtral_tower(),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_index=tiny.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _rows(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """Rows of placeholders: a break after each but the last, then the end."""
    cell = 4 * getattr(config, "spatial_merge_size", 1)
    rows, columns = ((4, 6), (5, 7))[which]
    drawn = Drawn(
        tensors={
            "pixels": paint(rows * cell, columns * cell),
            "size": (rows * cell, columns * cell),
        }
    )
    for row in range(rows):
        for column in range(columns):
            drawn.put(tiny.IMAGE, 0, 0, row, column)
        drawn.mark(BREAK if row < rows - 1 else END)
    return drawn


def _padded_to_largest(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """(images, 3, largest height, largest width) and the true sizes."""
    every = [picture.tensors for row in pictures for picture in row]
    if not every:
        return {}
    sizes = torch.tensor([tensors["size"] for tensors in every])
    height, width = sizes.amax(0).tolist()
    pixels = torch.zeros(len(every), 3, height, width)
    for image, tensors in zip(pixels, every, strict=True):
        h, w = tensors["size"]
        image[:, :h, :w] = tensors["pixels"]
    return {"pixel_values": pixels, "image_sizes": sizes}


KINDS = (
    Kind(
        "llava",
        LlavaForConditionalGeneration,
        lambda: _clip(LlavaConfig, vision_feature_layer=-2),
        _square,
        stacked("pixel_values"),
    ),
    Kind(
        "vipllava",
        VipLlavaForConditionalGeneration,
        _vipllava,
        _square,
        stacked("pixel_values"),
    ),
    Kind(
        "video_llava",
        VideoLlavaForConditionalGeneration,
        lambda: _clip(VideoLlavaConfig, video_token_index=tiny.VIDEO),
        _square_or_video,
        _images_and_videos,
        videos=True,
    ),
    Kind(
        "llava-pixtral",
        LlavaForConditionalGeneration,
        _pixtral_llava,
        _rows,
        _padded_to_largest,
    ),
    Kind(
        "mistral3",
        Mistral3ForConditionalGeneration,
        _mistral3,
        _rows,
        _padded_to_largest,
    ),
)
