"""Phi-4 multimodal: pictures in tiles, whose features the decoder itself puts among embeddings."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.families.kinds import TEXT, TOWER, Drawn, Kind, Paint
from tests.families.square import SIDE, _shrunk, _tiles
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

TILE, PATCH = 48, 4
PATCHES, PADDED = TILE // PATCH, 4  # along a side of a tile; columns of the second picture


def _phi4() -> Any:
    return transformers.Phi4MultimodalConfig(
        **TEXT,
        vision_config={
            **TOWER,
            "image_size": TILE,
            "patch_size": PATCH,
            "crop_size": TILE,
            "image_token_id": tiny.IMAGE,
        },
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 8,
            "audio_token_id": 9,
        },
    )


def _picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """One tile, or two of which the second is padding on the right; then the whole."""
    image = paint(TILE, TILE * (1 + which))
    tiles = torch.cat([_shrunk(image, TILE), _tiles(image, TILE)])
    masks = torch.ones(len(tiles), PATCHES, PATCHES)
    columns = SIDE * (1 + which)
    if which:
        masks[-1, :, -PADDED:] = 0
        columns -= PADDED // 2
    drawn = Drawn(tensors={"tiles": tiles, "masks": masks, "size": image.shape[1:]})
    for grid, width in ((0, columns), (1, SIDE)):
        for row in range(SIDE):
            for column in range(width):
                drawn.put(tiny.IMAGE, grid, 0, row, column)
            drawn.mark(tiny.IMAGE)
        if not grid:
            drawn.mark(tiny.IMAGE)
    return drawn


def _filled_up(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """Pictures with fewer tiles are filled up with black ones."""
    every = [picture.tensors for row in pictures for picture in row]
    if not every:
        return {}
    most = max(len(tensors["tiles"]) for tensors in every)
    pixels = torch.zeros(len(every), most, 3, TILE, TILE)
    masks = torch.ones(len(every), most, PATCHES, PATCHES)
    for number, tensors in enumerate(every):
        pixels[number, : len(tensors["tiles"])] = tensors["tiles"]
        masks[number, : len(tensors["masks"])] = tensors["masks"]
    sizes = torch.tensor([tensors["size"] for tensors in every])
    return {"image_pixel_values": pixels, "image_sizes": sizes, "image_attention_mask": masks}


def _steady(model: PreTrainedModel) -> None:
    """Features of ordinary size, from a tower that attends both ways."""
    for name, weight in model.named_parameters():
        if ".image_embed." in name and weight.dim() > 1:
            weight *= weight[0].numel() ** -0.5
    _both_ways(model)


def _both_ways(model: PreTrainedModel) -> None:
    """Under sdpa, transformers' own tower attends causally where no patch of the call is padding. A
    picture's features would then hang on the pictures beside it.
    """
    for module in model.modules():
        if type(module).__name__ == "Phi4MultimodalVisionAttention":
            module.is_causal = False


_MODEL = getattr(transformers, "Phi4MultimodalForCausalLM", None)
KINDS = (
    ()
    if _MODEL is None
    else (Kind("phi4_multimodal", _MODEL, _phi4, _picture, _filled_up, adjust=_steady),)
)
