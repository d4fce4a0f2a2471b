"""Pictures of any size whose places the rotary positions carry: Qwen3-VL, its mixture, GLM-4V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.families.kinds import TEXT, VIDEO, Drawn, Kind, Paint
from tests.helpers import tiny
from tests.helpers.inputs import Inputs

PATCH, MERGE, FRAMES_A_PATCH = tiny.QWEN_PATCH, tiny.QWEN_MERGE, tiny.QWEN_FRAMES
SIZES = ((4, 6), (5, 7), (4, 6))  # rows and columns of visual tokens; the last is a video
FRAMES = 3
DEEP = 2  # deepstack: features are added after this many decoder layers
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES_A_PATCH,
    "out_hidden_size": tiny.HIDDEN,
}
ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}


def _qwen3(make: Any, **text: Any) -> Any:
    return make(
        text_config={**TEXT, "rope_parameters": ROPE, **text},
        vision_config={
            **VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1][:DEEP],
        },
        **tiny._qwen_ids(),
    )


def _glm4v() -> Glm4vConfig:
    return Glm4vConfig(
        text_config={**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        vision_config={**VISION, "image_size": 48},
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        image_start_token_id=tiny.VISION_START,
        image_end_token_id=tiny.VISION_END,
    )


def _patches(frames: list[Tensor]) -> Tensor:
    """(patches, values): frames cut into cells of MERGE x MERGE patches, cell after cell."""
    cut = []
    for frame in frames:
        rows = frame.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # 3, rows, columns, P, P
        _, r, c, _, _ = rows.shape
        cells = rows.reshape(3, r // MERGE, MERGE, c // MERGE, MERGE, PATCH, PATCH)
        cells = cells.permute(1, 3, 2, 4, 0, 5, 6)  # cell row, cell column, row, column, 3, P, P
        twice = cells[..., None, :, :].expand(*cells.shape[:5], FRAMES_A_PATCH, PATCH, PATCH)
        cut.append(twice.reshape(r * c, -1))
    return torch.cat(cut)


def _picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    rows, columns = SIZES[which]
    size = rows * MERGE * PATCH, columns * MERGE * PATCH
    frames = [paint(*size) for _ in range(FRAMES if which == VIDEO else 1)]
    drawn = Drawn()
    for number in range(len(frames)):
        if which == VIDEO:  # each frame stands alone behind its time stamp
            drawn.mark(tiny.FIRST_WORD + number)
        drawn.mark(tiny.VISION_START)
        token = tiny.VIDEO if which == VIDEO else tiny.IMAGE
        drawn.square(token, number, rows, columns)
        drawn.mark(tiny.VISION_END)
    thw = torch.tensor([[len(frames), rows * MERGE, columns * MERGE]])
    names = ("pixel_values_videos", "video_grid_thw")
    if which != VIDEO:
        names = ("pixel_values", "image_grid_thw")
    drawn.tensors = dict(zip(names, (_patches(frames), thw), strict=True))
    return drawn


def _collate(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    types = (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long()
    made: Inputs = {"mm_token_type_ids": types}
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        every = [picture.tensors for row in pictures for picture in row]
        tensors = [tensors[name] for tensors in every if name in tensors]
        if tensors:
            made[name] = torch.cat(tensors)
    return made


def _gentle(model: PreTrainedModel) -> None:
    """Sandwich norms and a deep merger would blow up rounding errors, of the plain model too."""
    for name, weight in model.named_parameters():
        if "post_self_attn_layernorm" in name or "post_mlp_layernorm" in name:
            weight *= 0.4
        elif "q_proj" in name or "k_proj" in name or "visual" in name:
            weight *= 0.7


KINDS = (
    Kind(
        "qwen3_vl",
        Qwen3VLForConditionalGeneration,
        lambda: _qwen3(Qwen3VLConfig),
        _picture,
        _collate,
        videos=True,
    ),
    Kind(
        "qwen3_vl_moe",
        Qwen3VLMoeForConditionalGeneration,
        lambda: _qwen3(
            Qwen3VLMoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
        ),
        _picture,
        _collate,
        videos=True,
    ),
    Kind("glm4v", Glm4vForConditionalGeneration, _glm4v, _picture, _collate, adjust=_gentle),
)
