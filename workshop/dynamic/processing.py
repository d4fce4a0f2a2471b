"""Makes the second model's processor, with the first model's words and pictures of any size."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from atp_patch.builtin.dynamic.processing import SizedProcessor
from atp_patch.builtin.dynamic.tokens import (
    IMAGE_PAD,
    VIDEO_PAD,
    VISION,
    VISION_END,
    VISION_START,
)
from atp_patch.builtin.scenes import PATCH_PX
from atp_patch.builtin.tokens import IMAGE
from workshop.dynamic.architecture import FRAMES, MERGE
from workshop.processing import CHAT_TEMPLATE, build_tokenizer

LEAST_PX, MOST_PX = 128, 320
"""Pictures with fewer pixels than a square of side LEAST_PX, or more than one of side MOST_PX, are
resized. The sides of all others are only rounded to multiples of 16."""


# Where an answer begins and ends. Without it, transformers' server would look for Qwen's own marks.
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "ASSISTANT:",
    "fields": {"content": {"close_pattern": "\\s*</s>", "content": "text"}},
}


def build_processor() -> SizedProcessor:
    """Make the processor of the second built-in model."""
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": LEAST_PX**2, "longest_edge": MOST_PX**2},
        patch_size=PATCH_PX,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    named = {
        "image_token": IMAGE_PAD,
        "video_token": VIDEO_PAD,
        "vision_start_token": VISION_START,
        "vision_end_token": VISION_END,
    }
    tokenizer = build_tokenizer(VISION, named)
    tokenizer.response_template = RESPONSES
    return SizedProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE.replace(IMAGE, VISION_START + IMAGE_PAD + VISION_END),
    )


def save_processor(folder: Path) -> None:
    """Write it as a Qwen3-VL processor, which `AutoProcessor` reads if there is torchvision."""
    build_processor().save_pretrained(folder)
    own, known = SizedProcessor.__name__, Qwen3VLProcessor.__name__
    for name in ("processor_config.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text("utf-8").replace(f'"{own}"', f'"{known}"'), "utf-8")
    video = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "size": {"shortest_edge": LEAST_PX**2, "longest_edge": MOST_PX**2},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    text = json.dumps(video, indent=2) + "\n"
    (folder / "video_preprocessor_config.json").write_text(text, "utf-8")
