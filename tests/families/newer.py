"""Families of later versions of transformers, and those whose towers are timm's: Ovis 2, FastVLM,
Perception LM.

A stand-in of a few lines takes the place of timm's towers: it hands on what they hand on.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Paint, installed, stacked
from tests.families.square import SIDE, _shrunk, _tiles
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

TILE, PATCH = 48, 4
FRAMES = 3


class StandInConfig(PreTrainedConfig):
    model_type = "stand_in_tower"


class StandInTower(PreTrainedModel):
    """Each patch by itself: (N, C, rows, columns), or (N, 1 + patches, C) behind a class token."""

    config_class = StandInConfig
    _supports_sdpa = True  # there is no attention in it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.stand_in_patch
        self.patches = nn.Conv2d(3, config.hidden_size, size, size)
        self.flat = config.stand_in_flat
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        features = self.patches(pixel_values)
        if self.flat:
            features = features.flatten(2).transpose(1, 2)
            features = torch.cat([features.mean(1, keepdim=True), features], 1)
        return BaseModelOutputWithPooling(last_hidden_state=features)


AutoConfig.register("stand_in_tower", StandInConfig)
AutoModel.register(StandInConfig, StandInTower)


def _stand_in(patch: int, *, flat: bool, **more: Any) -> StandInConfig:
    return StandInConfig(hidden_size=32, stand_in_patch=patch, stand_in_flat=flat, **more)


def _qwen2() -> Any:
    return transformers.Qwen2Config(**TEXT)


# -- FastVLM: one square an image ------------------------------------------------------------------


def _fast_vlm() -> Any:
    return transformers.FastVlmConfig(
        vision_config=_stand_in(TILE // SIDE, flat=False),
        text_config=_qwen2(),
        image_token_index=tiny.IMAGE,
        image_seq_length=SIDE**2,
    )


def _one_square(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    drawn = Drawn(tensors={"pixel_values": paint(TILE, TILE)[None]})
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    return drawn


# -- Perception LM: tiles of one run, frames of one run --------------------------------------------


def _perception_lm() -> Any:
    patches = 2 * SIDE
    args = {"embed_dim": 32, "ref_feat_shape": [patches, patches]}
    return transformers.PerceptionLMConfig(
        vision_config=_stand_in(TILE // patches, flat=True, model_args=args),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        projector_pooling_ratio=2,
    )


def _tiles_or_frames(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    if which == VIDEO:
        drawn = Drawn(tensors={"frames": torch.stack([paint(TILE, TILE) for _ in range(FRAMES)])})
        for frame in range(FRAMES):
            drawn.square(tiny.VIDEO, 0, SIDE, SIDE, frame)
        return drawn
    tiles = paint(TILE, TILE)[None]
    if which:
        wide = paint(TILE, 2 * TILE)
        tiles = torch.cat([_shrunk(wide, TILE), _tiles(wide, TILE)])
    drawn = Drawn(tensors={"tiles": tiles})
    for tile in range(len(tiles)):
        drawn.square(tiny.IMAGE, tile, SIDE, SIDE)
    return drawn


def _together(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """(images, tiles, 3, h, w); all in one row where their tiles are not as many."""
    every = [picture.tensors for row in pictures for picture in row]
    made = {}
    for name, key in (("tiles", "pixel_values"), ("frames", "pixel_values_videos")):
        tensors = [tensors[name] for tensors in every if name in tensors]
        if tensors:
            even = len({len(tensor) for tensor in tensors}) == 1
            made[key] = torch.stack(tensors) if even else torch.cat(tensors)[None]
    return made


# -- Ovis 2: the whole, then tiles, with indicator ids between -------------------------------------

WHOLE, GRID, COLUMN, ROW, CLOSE = 3, 4, 6, 7, 9


def _ovis2() -> Any:
    vision = {
        **TOWER,
        "image_size": TILE,
        "patch_size": PATCH,
        "hidden_stride": 2,
        "vocab_size": 40,
        "num_visual_indicator_tokens": 5,
    }
    return transformers.Ovis2Config(
        vision_config=vision,
        text_config=_qwen2(),
        image_token_id=tiny.IMAGE,
        visual_indicator_token_ids=[WHOLE, GRID, COLUMN, ROW, CLOSE],
        vocab_size=tiny.VOCAB,
        hidden_size=tiny.HIDDEN,
    )


def _ovis2_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    picture = paint(TILE, TILE * (1 + which))
    tiles = _shrunk(picture, TILE)
    drawn = Drawn()
    drawn.mark(WHOLE)
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    drawn.mark(GRID)
    if which:  # one row of two tiles
        tiles = torch.cat([tiles, _tiles(picture, TILE)])
        drawn.square(tiny.IMAGE, 1, SIDE, SIDE)
        drawn.mark(COLUMN)
        drawn.square(tiny.IMAGE, 2, SIDE, SIDE)
    drawn.mark(CLOSE)
    drawn.tensors = {"pixel_values": tiles}
    return drawn


def _sharp_words(model: PreTrainedModel) -> None:
    """A softmax over visual words that is far from flat, and embeddings that can be told apart."""
    for name, weight in model.named_parameters():
        if "head_linear" in name:
            weight *= 3


KINDS = installed(
    {
        "FastVlm": ("fast_vlm", _fast_vlm, _one_square, stacked("pixel_values"), {}),
        "PerceptionLM": (
            "perception_lm",
            _perception_lm,
            _tiles_or_frames,
            _together,
            {"videos": True},
        ),
        "Ovis2": (
            "ovis2",
            _ovis2,
            _ovis2_picture,
            stacked("pixel_values"),
            {"adjust": _sharp_words},
        ),
    }
)
