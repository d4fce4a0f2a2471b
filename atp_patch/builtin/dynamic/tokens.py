"""The tokens of the second model: the first model's words, then the tokens around an image."""

from __future__ import annotations

from functools import cache

from atp_patch.builtin.tokens import ASSISTANT, BOS, USER, word_ids

VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VISION: tuple[str, ...] = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

PREFIX = (BOS, USER, VISION_START)
"""Tokens before the image."""


@cache
def token_ids() -> dict[str, int]:
    """Return the id of each token. The result must not be changed."""
    first = word_ids()
    return first | {token: len(first) + k for k, token in enumerate(VISION)}


def prompt(question: str) -> str:
    """Return the prompt of a question about one image, as the chat template writes it."""
    return f"{BOS}USER: {VISION_START}{IMAGE_PAD}{VISION_END} {question} {ASSISTANT}"
