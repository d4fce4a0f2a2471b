"""The processor of the second built-in model, for pictures at their own size."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from atp_patch.builtin.dynamic.tokens import (
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    token_ids,
)


class SizedProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without videos, so that it does not need torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        ids = token_ids()
        self.image_token, self.image_token_id = IMAGE_PAD, ids[IMAGE_PAD]
        self.video_token, self.video_token_id = VIDEO_PAD, ids[VIDEO_PAD]
        self.vision_start_token, self.vision_start_token_id = VISION_START, ids[VISION_START]
        self.vision_end_token, self.vision_end_token_id = VISION_END, ids[VISION_END]
