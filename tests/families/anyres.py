"""Pictures of any resolution: LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution

from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Kind, Paint
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

TILE, PATCH, SIDE = 48, 8, 6
PINPOINTS = [[48, 96], [96, 48], [96, 96]]
SIZES = ((48, 96), (60, 96))  # the second leaves borders above and below on its canvas
FRAMES = 3


def _vision(make: Any, **more: Any) -> Any:
    return make(**{**TOWER, "image_size": TILE, "patch_size": PATCH, **more})


def _next(make: Any, text: Any) -> Any:
    return make(
        vision_config=_vision(CLIPVisionConfig),
        text_config=text,
        image_token_index=tiny.IMAGE,
        image_grid_pinpoints=PINPOINTS,
        pad_token_id=tiny.PAD,
        **({"video_token_index": tiny.VIDEO} if make is LlavaNextVideoConfig else {}),
    )


def _onevision() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=_vision(SiglipVisionConfig, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=tiny.IMAGE,
        video_token_index=tiny.VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_1",
    )


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(image[None], (height, width), mode="bilinear")[0]


def _canvas(image: Tensor) -> Tensor:
    """The picture in the middle of the pinpoint that fits it best, as large as it goes."""
    _, h, w = image.shape
    height, width = select_best_resolution((h, w), PINPOINTS)
    scale = min(height / h, width / w)
    inner = _resized(image, round(h * scale), round(w * scale))
    down, right = height - inner.shape[1], width - inner.shape[2]
    borders = (right // 2, right - right // 2, down // 2, down - down // 2)
    return torch.nn.functional.pad(inner, borders, mode="replicate")


def _tiles(image: Tensor) -> Tensor:
    """(1 + tiles, 3, TILE, TILE): the whole picture small, then the canvas cut up row by row."""
    cut = _canvas(image).unfold(1, TILE, TILE).unfold(2, TILE, TILE)
    return torch.cat([_resized(image, TILE, TILE)[None], cut.permute(1, 2, 0, 3, 4).flatten(0, 1)])


def _unpadded(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that the picture, not its border, takes up on the canvas."""
    pinpoint = select_best_resolution(size, PINPOINTS)
    rows, columns = pinpoint[0] // PATCH, pinpoint[1] // PATCH
    if size[1] / size[0] > columns / rows:
        border = (rows - int(size[0] * columns / size[1])) // 2
        return rows - 2 * border, columns
    border = (columns - int(size[1] * rows / size[0])) // 2
    return rows, columns - 2 * border


def _picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    if which == VIDEO:
        return _video(config, paint)
    size = SIZES[which]
    image = paint(*size)
    drawn = Drawn()
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    one_tile = count > 1 and config.model_type == "llava_onevision"
    if one_tile:  # OneVision cuts up a picture only where it is the sample's only one
        tiles = _resized(image, TILE, TILE)[None]
        drawn.mark(tiny.IMAGE)
    else:
        tiles = _tiles(image)
        rows, columns = _unpadded(size)
        if config.model_type == "llava_onevision":
            shrink = (rows * columns / SIDE**2) ** 0.5  # more than one tile's worth is scaled down
            if shrink > 1.1:
                rows, columns = int(rows // shrink), int(columns // shrink)
        for row in range(rows):
            for column in range(columns):
                drawn.put(tiny.IMAGE, 1, 0, row, column)
            drawn.mark(tiny.IMAGE)  # the newline has the image's id
    drawn.tensors = {"tiles": tiles, "size": size}
    return drawn


def _video(config: Any, paint: Paint) -> Drawn:
    drawn = Drawn(tensors={"frames": torch.stack([paint(TILE, TILE) for _ in range(FRAMES)])})
    for frame in range(FRAMES):
        drawn.square(tiny.VIDEO, 0, SIDE // 2, SIDE // 2, frame)
    if config.model_type == "llava_onevision":
        drawn.mark(tiny.VIDEO)
    return drawn


def _collate(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """(images, most tiles, 3, TILE, TILE), images with fewer tiles filled up with black."""
    every = [picture.tensors for row in pictures for picture in row]
    tiles = [tensors["tiles"] for tensors in every if "tiles" in tensors]
    frames = [tensors["frames"] for tensors in every if "frames" in tensors]
    made: Inputs = {}
    if tiles:
        pixels = torch.zeros(len(tiles), max(map(len, tiles)), 3, TILE, TILE)
        for row, cut in zip(pixels, tiles, strict=True):
            row[: len(cut)] = cut
        sizes = [tensors["size"] for tensors in every if "size" in tensors]
        made = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    if frames:
        made["pixel_values_videos"] = torch.stack(frames)
    return made


def _collate_counted(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """OneVision's processor also says how many images each sample has."""
    made = _collate(pictures, inputs)
    if "pixel_values" in made:
        counts = [sum("tiles" in picture.tensors for picture in row) for row in pictures]
        made["batch_num_images"] = torch.tensor([count for count in counts if count])
    return made


KINDS = (
    Kind(
        "llava_next",
        LlavaNextForConditionalGeneration,
        lambda: _next(LlavaNextConfig, MistralConfig(**TEXT, sliding_window=None)),
        _picture,
        _collate,
    ),
    Kind(
        "llava_next_video",
        LlavaNextVideoForConditionalGeneration,
        lambda: _next(LlavaNextVideoConfig, LlamaConfig(**TEXT)),
        _picture,
        _collate,
        videos=True,
    ),
    Kind(
        "llava_onevision",
        LlavaOnevisionForConditionalGeneration,
        _onevision,
        _picture,
        _collate_counted,
        videos=True,
    ),
)
