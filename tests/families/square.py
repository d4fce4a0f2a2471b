"""Families whose images or tiles are squares of one size: InternVL, Gemma, Idefics, SmolVLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.families.hosts import WINDOWS_OVER_IMAGES
from tests.families.kinds import TEXT, TOWER, Drawn, Kind, Paint, stacked
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

SIDE = 6  # visual tokens of one tile: 6 x 6
OPEN, CLOSE, MARK = 6, 7, 9


def _tiles(image: Tensor, size: int) -> Tensor:
    """(3, h, w) -> (tiles, 3, size, size), row by row."""
    rows = image.unfold(1, size, size).unfold(2, size, size)  # 3, rows, columns, size, size
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1)


def _shrunk(image: Tensor, size: int) -> Tensor:
    """(1, 3, size, size) the whole picture as one tile."""
    return torch.nn.functional.interpolate(image[None], (size, size), mode="bilinear")


# -- InternVL: one run of placeholders, the tiles and then the thumbnail ---------------------------


def _internvl() -> InternVLConfig:
    vision = {**TOWER, "image_size": [48, 48], "patch_size": [4, 4]}
    return InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_id=tiny.IMAGE,
        downsample_ratio=0.5,
    )


def _internvl_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    tiles = _tiles(paint(48, 48 * (1 + which)), 48)
    if which:  # two tiles and the thumbnail of both
        tiles = torch.cat([tiles, _shrunk(paint(48, 96), 48)])
    drawn = Drawn(tensors={"pixel_values": tiles})
    drawn.mark(OPEN)
    for tile in range(len(tiles)):
        drawn.square(tiny.IMAGE, tile, SIDE, SIDE)
    drawn.mark(CLOSE)
    return drawn


# -- PaliGemma: pictures first, then text; everything before the answer attends both ways ---------


def _paligemma(text: Any) -> PaliGemmaConfig:
    vision = {**TOWER, "model_type": "siglip_vision_model", "image_size": 48, "patch_size": 8}
    return PaliGemmaConfig(
        vision_config={**vision, "vision_use_head": False},
        text_config=text,
        image_token_index=tiny.IMAGE,
        projection_dim=tiny.HIDDEN,
    )


def _paligemma2() -> PaliGemmaConfig:
    return _paligemma(
        Gemma2Config(
            **TEXT,
            sliding_window=tiny.WINDOW,
            query_pre_attn_scalar=tiny.HEAD_DIM,
        )
    )


def _siglip_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    drawn = Drawn(tensors={"pixel_values": paint(48, 48)[None]})
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    return drawn


def _prefix(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """Without an answer in it, all of the text is prefix: token type 0."""
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    return {**stacked("pixel_values")(pictures, inputs), **types}


def _prefix_blocks(inputs: Inputs) -> Tensor:
    return torch.where(inputs["token_type_ids"] == 0, 0, -1)


# -- Gemma 3: each picture attends both ways; sliding and full layers ------------------------------


def _gemma3() -> Gemma3Config:
    text = Gemma3TextConfig(
        **TEXT,
        sliding_window=tiny.WINDOW,
        query_pre_attn_scalar=tiny.HEAD_DIM,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2
        + ["sliding_attention", "full_attention"],
    )
    return Gemma3Config(
        text_config=text,
        vision_config={**TOWER, "image_size": 48, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=SIDE**2,
        image_token_index=tiny.IMAGE,
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
    )


def _gemma3_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    drawn = Drawn(tensors={"pixel_values": paint(48, 48)[None]})
    drawn.mark(MARK, OPEN)
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    drawn.mark(CLOSE, MARK)
    return drawn


def _types(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    types = {"token_type_ids": (inputs["input_ids"] == tiny.IMAGE).long()}
    return {**stacked("pixel_values")(pictures, inputs), **types}


def _picture_blocks(inputs: Inputs) -> Tensor:
    """Each run of placeholders is a block of its own."""
    visual = inputs["input_ids"] == tiny.IMAGE
    starts = visual.clone()
    starts[:, 1:] &= ~visual[:, :-1]
    return torch.where(visual, starts.long().cumsum(1), -1)


def _plain_norms(model: PreTrainedModel) -> None:
    """Gemma's norms multiply by one more than their weight."""
    for name, weight in model.get_decoder().named_parameters():
        if "norm" in name:
            weight -= 1


# -- Idefics 3 and SmolVLM: tiles behind markers, then the whole picture ---------------------------


def _idefics3(make: Any) -> Any:
    vision = {**TOWER, "image_size": 48, "patch_size": 4}
    return make(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=tiny.IMAGE,
        scale_factor=2,
        pad_token_id=tiny.PAD,
    )


def _idefics3_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    whole = _shrunk(paint(48, 96), 48) if which else paint(48, 48)[None]
    tiles = torch.cat([_tiles(paint(48, 96), 48), whole]) if which else whole
    drawn = Drawn(tensors={"pixel_values": tiles})
    for tile in range(len(tiles)):
        drawn.mark(OPEN, MARK)  # <fake_token_around_image><row_1_col_1> or <global-img>
        drawn.square(tiny.IMAGE, tile, SIDE, SIDE)
    drawn.mark(OPEN)
    return drawn


def _tiles_of_samples(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """(B, most tiles, 3, h, w): samples with fewer tiles get black ones, which the model drops."""
    rows = [
        torch.cat(
            [torch.empty(0, 3, 48, 48), *(picture.tensors["pixel_values"] for picture in row)]
        )
        for row in pictures
    ]
    most = max(len(row) for row in rows)
    if most == 0:
        return {}
    pixels, mask = torch.zeros(len(rows), most, 3, 48, 48), torch.zeros(len(rows), most, 48, 48)
    for b, row in enumerate(rows):
        pixels[b, : len(row)], mask[b, : len(row)] = row, 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask.bool()}


KINDS = (
    Kind(
        "internvl",
        InternVLForConditionalGeneration,
        _internvl,
        _internvl_picture,
        stacked("pixel_values"),
    ),
    Kind(
        "paligemma",
        PaliGemmaForConditionalGeneration,
        lambda: _paligemma(GemmaConfig(**TEXT)),
        _siglip_picture,
        _prefix,
        pictures_first=True,
        blocks=_prefix_blocks,
        adjust=_plain_norms,
    ),
    Kind(
        "paligemma2",
        PaliGemmaForConditionalGeneration,
        _paligemma2,
        _siglip_picture,
        _prefix,
        pictures_first=True,
        blocks=_prefix_blocks,
        adjust=_plain_norms,
        attention="eager",  # Gemma 2 caps its attention logits
    ),
    Kind(
        "gemma3",
        Gemma3ForConditionalGeneration,
        _gemma3,
        _gemma3_picture,
        _types,
        blocks=_picture_blocks,
        window_over_blocks=WINDOWS_OVER_IMAGES,
        adjust=_plain_norms,
    ),
    Kind(
        "idefics3",
        Idefics3ForConditionalGeneration,
        lambda: _idefics3(Idefics3Config),
        _idefics3_picture,
        _tiles_of_samples,
    ),
    Kind(
        "smolvlm",
        SmolVLMForConditionalGeneration,
        lambda: _idefics3(SmolVLMConfig),
        _idefics3_picture,
        _tiles_of_samples,
    ),
)
