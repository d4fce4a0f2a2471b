"""Gemma 4: pictures of any size, heads of two sizes, keys that later layers reuse, and the unified
model without a vision tower.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.families.kinds import TEXT, TOWER, VIDEO, Drawn, Kind, Paint
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

PATCH, CELL = 4, 2  # a token is 2 x 2 patches of 4 x 4 pixels
OPEN, CLOSE, AUDIO = 6, 7, 9
SIZES = ((4, 6), (5, 7))  # rows and columns of tokens of the pictures
FRAME, FRAMES = (3, 4), 2
MOST = 40  # tokens to which the processor pads each picture
SLIDING, FULL = "sliding_attention", "full_attention"
GLOBAL_HEAD_DIM = 32
SHARED = "gemma4-shared"  # the row whose last layers reuse keys
# Early versions of transformers take the frames of each video apart.
FRAMES_IN_A_ROW = (
    not hasattr(transformers, "Gemma4Model")
    or "num_frames_per_video" in signature(transformers.Gemma4Model.forward).parameters
)


def _text(make: Any, **more: Any) -> Any:
    return make(
        **TEXT,
        sliding_window=tiny.WINDOW,
        global_head_dim=GLOBAL_HEAD_DIM,
        **{"layer_types": ([SLIDING] * 2 + [FULL]) * 2 + [SLIDING, FULL], **more},
    )


def _ids() -> dict[str, Any]:
    return {
        "image_token_id": tiny.IMAGE,
        "video_token_id": tiny.VIDEO,
        "audio_token_id": AUDIO,
        "boi_token_id": OPEN,
        "eoi_token_id": CLOSE,
    }


def _gemma4(**text: Any) -> Any:
    vision = {
        **TOWER,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": PATCH,
        "pooling_kernel_size": CELL,
        "position_embedding_size": 64,
    }
    per_layer = {"vocab_size_per_layer_input": tiny.VOCAB, "hidden_size_per_layer_input": 0}
    return transformers.Gemma4Config(
        text_config=_text(transformers.Gemma4TextConfig, **{**per_layer, **text}),
        vision_config=transformers.Gemma4VisionConfig(**vision),
        audio_config=None,
        **_ids(),
    )


def _both_ways() -> Any:
    """As in the larger models: images attend both ways, and full layers have fewer key heads."""
    return _gemma4(
        use_bidirectional_attention="vision",
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    )


def _shared() -> Any:
    """As in the smaller models: the last layers reuse keys, and each layer has further inputs."""
    return _gemma4(
        num_kv_shared_layers=3,
        hidden_size_per_layer_input=8,
        layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        use_double_wide_mlp=True,
    )


def _unified() -> Any:
    vision = {
        "patch_size": PATCH,
        "pooling_kernel_size": CELL,
        "mm_embed_dim": 32,
        "mm_posemb_size": 64,
        "output_proj_dims": 32,
    }
    return transformers.Gemma4UnifiedConfig(
        text_config=_text(transformers.Gemma4UnifiedTextConfig),
        vision_config=transformers.Gemma4UnifiedVisionConfig(**vision),
        audio_config=None,
        **_ids(),
    )


def _patches(image: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(patches, side * side * 3) pixels and (patches, 2) columns and rows, row by row."""
    _, height, width = image.shape
    pixels, places = [], []
    for row in range(height // side):
        for column in range(width // side):
            part = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            pixels.append(part.permute(1, 2, 0).flatten())
            places.append((column, row))
    return torch.stack(pixels), torch.tensor(places)


def _filled_up(image: Tensor, side: int, most: int) -> tuple[Tensor, Tensor]:
    """Patches and places of an image, with padding behind them up to ``most`` patches."""
    pixels, places = _patches(image, side)
    rest = most - len(pixels)
    return (
        torch.cat([pixels, torch.zeros(rest, pixels.shape[1])]),
        torch.cat([places, torch.full((rest, 2), -1)]),
    )


def _picture(joined: bool) -> Any:
    """A function that draws a picture; ``joined``: the processor joins cells of patches."""
    side, most = (PATCH * CELL, MOST) if joined else (PATCH, MOST * CELL**2)

    def draw(config: Any, which: int, paint: Paint, count: int) -> Drawn:
        video = which == VIDEO
        rows, columns = FRAME if video else SIZES[which]
        drawn = Drawn()
        made = []
        for number in range(FRAMES if video else 1):
            if video:
                drawn.mark(tiny.FIRST_WORD + number)  # the time stamp
            drawn.mark(OPEN)
            drawn.square(tiny.VIDEO if video else tiny.IMAGE, number, rows, columns)
            drawn.mark(CLOSE)
            image = paint(rows * PATCH * CELL, columns * PATCH * CELL)
            made.append(_filled_up(image, side, most))
        pixels, places = (torch.stack(list(part)) for part in zip(*made, strict=True))
        drawn.tensors = {"video" if video else "image": (pixels, places)}
        return drawn

    return draw


def _collated(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    made = {"mm_token_type_ids": (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long()}
    every = [picture.tensors for row in pictures for picture in row]
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        found = [tensors[kind] for tensors in every if kind in tensors]
        if found:
            joined = torch.stack if kind == "video" and not FRAMES_IN_A_ROW else torch.cat
            made[name] = joined([pixels for pixels, _ in found])
            made[f"{kind}_position_ids"] = joined([places for _, places in found])
        if found and kind == "video" and FRAMES_IN_A_ROW:
            made["num_frames_per_video"] = torch.tensor([len(pixels) for pixels, _ in found])
    return made


def _picture_blocks(inputs: Inputs) -> Tensor:
    """Each run of placeholders is a block of its own."""
    visual = inputs["mm_token_type_ids"] > 0
    starts = visual.clone()
    starts[:, 1:] &= ~visual[:, :-1]
    return torch.where(visual, starts.long().cumsum(1), -1)


BOTH_WAYS: dict[str, Any] = {
    "blocks": _picture_blocks,
    "blocks_slide": True,
    "window_over_blocks": True,
}


def _less_sharp(model: transformers.PreTrainedModel) -> None:
    """Gemma 4 does not scale attention logits by the size of a head."""
    for name, weight in model.get_decoder().named_parameters():
        if "q_norm" in name:
            weight *= 0.4


def _kinds() -> list[Kind]:
    """Those that the installed version of transformers has."""
    table: dict[str, tuple[str, Any, bool, dict[str, Any]]] = {
        "gemma4": ("Gemma4", _both_ways, False, BOTH_WAYS),
        SHARED: ("Gemma4", _shared, False, {"layers": (1, 2, 3), "last_layer": 3}),
        "gemma4_unified": ("Gemma4Unified", _unified, True, {"blocks": _picture_blocks}),
    }
    kinds = []
    for name, (prefix, config, joined, more) in table.items():
        model = getattr(transformers, f"{prefix}ForConditionalGeneration", None)
        if model is not None:
            draw = _picture(joined)
            more = {"videos": True, "adjust": _less_sharp, **more}
            kinds.append(Kind(name, model, config, draw, _collated, **more))
    return kinds


KINDS = tuple(_kinds())
