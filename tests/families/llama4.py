"""Llama 4: tiles, rotary tables of complex numbers, attention within chunks."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version

from tests.families.hosts import HOST
from tests.families.kinds import TEXT, TOWER, Drawn, Paint, installed, stacked
from tests.families.square import SIDE, _shrunk, _tiles
from tests.helpers import tiny

START, WHOLE, ACROSS, DOWN, END = 3, 4, 6, 7, 9
TILE, PATCH = 48, 4


def config(**more: Any) -> Any:
    """Every fourth layer attends to everything, without rotary embedding; others within chunks."""
    text = {
        **TEXT,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": tiny.WINDOW,
        **more,
    }
    vision = {
        **TOWER,
        "image_size": TILE,
        "patch_size": PATCH,
        "pixel_shuffle_ratio": 0.5,
        "intermediate_size": TOWER["hidden_size"] * 4,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    return transformers.Llama4Config(
        text_config=transformers.Llama4TextConfig(**text),
        vision_config=transformers.Llama4VisionConfig(**vision),
        image_token_index=tiny.IMAGE,
        pad_token_id=tiny.PAD,
    )


def _picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """Tiles in rows, separated by marks, and then the whole picture; a small one is one tile."""
    image = paint(TILE, TILE * (1 + which))
    drawn = Drawn(tensors={"pixel_values": _shrunk(image, TILE)})
    drawn.mark(START)
    if which:
        drawn.tensors["pixel_values"] = torch.cat([_tiles(image, TILE), _shrunk(image, TILE)])
        drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
        drawn.mark(ACROSS)
        drawn.square(tiny.IMAGE, 1, SIDE, SIDE)
        drawn.mark(DOWN)
    drawn.mark(WHOLE)
    drawn.square(tiny.IMAGE, 2 if which else 0, SIDE, SIDE)
    drawn.mark(END)
    return drawn


# In 5.24.0 each forward pass of the plain model fails.
KINDS = (
    ()
    if Version("5.24.0") == HOST
    else installed({"Llama4": ("llama4", config, _picture, stacked("pixel_values"), {})})
)
