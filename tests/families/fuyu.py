"""Fuyu: patches of pixels without a tower, an id of text behind each row."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from transformers import FuyuConfig, FuyuForCausalLM

from tests.families.kinds import TEXT, Drawn, Kind, Paint
from tests.families.sized import _cells
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

SIZES = ((4, 6), (5, 7))
# Early versions of transformers have another name for the pixels.
PIXELS = next(
    name
    for name in ("image_patches", "pixel_values")
    if name in signature(FuyuForCausalLM.forward).parameters
)
NEWLINE = 9


def _fuyu() -> FuyuConfig:
    text = {**TEXT, "model_type": "persimmon", "rope_theta": 1000.0}
    return FuyuConfig(
        text_config=text,
        hidden_size=TEXT["hidden_size"],  # early versions take it from here
        image_token_id=tiny.IMAGE,
        patch_size=4,
        image_size=48,
    )


def _rows(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    rows, columns = SIZES[which]
    drawn = Drawn(tensors={"patches": _cells(paint(rows * 4, columns * 4), 1)})
    for row in range(rows):
        for column in range(columns):
            drawn.put(tiny.IMAGE, 0, 0, row, column)
        drawn.mark(NEWLINE)
    return drawn


def _patches(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    tensors = [picture.tensors["patches"] for row in pictures for picture in row]
    return {PIXELS: torch.cat(tensors)[None]} if tensors else {}


KINDS = (Kind("fuyu", FuyuForCausalLM, _fuyu, _rows, _patches),)
