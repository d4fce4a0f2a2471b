"""Pictures as learned queries: Idefics 2, Aria."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaTextConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3VisionConfig,
    MistralConfig,
    PreTrainedModel,
)

from tests.families.kinds import TEXT, TOWER, Drawn, Kind, Paint
from tests.families.square import _shrunk, _tiles, _tiles_of_samples
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

TILE, QUERIES = 48, 30
OPEN, CLOSE = 6, 7


def _idefics2() -> Idefics2Config:
    return Idefics2Config(
        vision_config={**TOWER, "image_size": TILE, "patch_size": 8},
        perceiver_config={
            "hidden_size": tiny.HIDDEN,
            "resampler_n_latents": QUERIES,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
        },
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=tiny.IMAGE,
    )


def _idefics2_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """The picture, or its two halves and the whole, with one mark between and around."""
    picture = paint(TILE, TILE * (1 + which))
    tiles = _tiles(picture, TILE)
    if which:
        tiles = torch.cat([tiles, _shrunk(picture, TILE)])
    drawn = Drawn(tensors={"pixel_values": tiles})
    for tile in range(len(tiles)):
        drawn.mark(OPEN)
        drawn.square(tiny.IMAGE, tile, 1, QUERIES)
    drawn.mark(OPEN)
    return drawn


def _aria() -> AriaConfig:
    text = AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    return AriaConfig(
        vision_config=Idefics3VisionConfig(**TOWER, image_size=TILE, patch_size=8),
        text_config=text,
        image_token_index=tiny.IMAGE,
        projector_patch_to_query_dict={36: QUERIES},
    )


def _aria_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """One crop, or two in one run."""
    crops = _tiles(paint(TILE, TILE * (1 + which)), TILE)
    drawn = Drawn(tensors={"pixel_values": crops})
    drawn.mark(OPEN)
    drawn.square(tiny.IMAGE, 0, 1, QUERIES * len(crops))
    drawn.mark(CLOSE)
    return drawn


def _with_masks(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    tensors = [one.tensors["pixel_values"] for row in pictures for one in row]
    if not tensors:
        return {}
    pixels = torch.cat(tensors)
    return {"pixel_values": pixels, "pixel_mask": torch.ones(len(pixels), TILE, TILE).bool()}


def _unlike_queries(model: PreTrainedModel) -> None:
    """Queries that can be told apart: all of Aria's begin as zeros."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if name.endswith(("projector.query", "perceiver_resampler.latents")):
            weight.copy_(torch.randn(weight.shape, generator=generator))


KINDS = (
    Kind(
        "idefics2",
        Idefics2ForConditionalGeneration,
        _idefics2,
        _idefics2_picture,
        _tiles_of_samples,
        adjust=_unlike_queries,
        placed=False,
    ),
    Kind(
        "aria",
        AriaForConditionalGeneration,
        _aria,
        _aria_picture,
        _with_masks,
        adjust=_unlike_queries,
        placed=False,
    ),
)
