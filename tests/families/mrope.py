"""Pictures of any size whose places the rotary positions carry: Qwen, GLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
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
VIDEO_START, VIDEO_END = 3, 4
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


def _qwen3(make: Any, deep: int = DEEP, **text: Any) -> Any:
    return make(
        text_config={**TEXT, "rope_parameters": ROPE, **text},
        vision_config={
            **VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1][:deep],
        },
        **tiny._qwen_ids(),
    )


def _glm(make: Any, **text: Any) -> Any:
    whole = {"partial_rotary_factor": 1.0}
    return make(
        text_config={**TEXT, "rope_parameters": {**ROPE, **whole}, **whole, **text},
        vision_config={**VISION, "image_size": 48},
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
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


def _one_run(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """Qwen2-VL: nothing stands between the frames of a video."""
    if which != VIDEO:
        return _picture(config, which, paint, count)
    apart = _picture(config, which, paint, count)
    drawn = Drawn(tensors=apart.tensors)
    drawn.mark(tiny.VISION_START)
    for frame in range(FRAMES):
        drawn.square(tiny.VIDEO, 0, *SIZES[VIDEO], frame)
    drawn.mark(tiny.VISION_END)
    return drawn


def _glm_picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """GLM: frames have the id of images, and a video stands between marks of its own."""
    picture = _picture(config, which, paint, count)
    if which != VIDEO:
        return picture
    drawn = Drawn(tensors=picture.tensors)
    drawn.mark(VIDEO_START)
    drawn.ids += [tiny.IMAGE if token == tiny.VIDEO else token for token in picture.ids]
    drawn.places += picture.places
    drawn.mark(VIDEO_END)
    return drawn


def _collate_glm(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    within = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
    types = (ids == tiny.IMAGE).long() * (1 + within.long())
    return {**_collate(pictures, inputs), "mm_token_type_ids": types}


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
        "qwen3_vl-flat",  # without deepstack
        Qwen3VLForConditionalGeneration,
        lambda: _qwen3(Qwen3VLConfig, deep=0),
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
    Kind(
        "qwen2_vl",
        Qwen2VLForConditionalGeneration,
        lambda: tiny._config("qwen2_vl"),
        _one_run,
        _collate,
        videos=True,
    ),
    Kind(
        "qwen2_5_vl",
        Qwen2_5_VLForConditionalGeneration,
        lambda: tiny._config("qwen2_5_vl"),
        _one_run,
        _collate,
        videos=True,
    ),
    *(
        Kind(
            name,
            model,
            config,
            _glm_picture,
            _collate_glm,
            adjust=_gentle,
            videos=True,
            mixes=False,
        )
        for name, model, config in (
            ("glm4v", Glm4vForConditionalGeneration, lambda: _glm(Glm4vConfig)),
            ("glm46v", Glm46VForConditionalGeneration, lambda: _glm(Glm46VConfig)),
            (
                "glm4v_moe",
                Glm4vMoeForConditionalGeneration,
                lambda: _glm(
                    Glm4vMoeConfig,
                    n_routed_experts=4,
                    num_experts_per_tok=2,
                    moe_intermediate_size=48,
                ),
            ),
        )
    ),
)
