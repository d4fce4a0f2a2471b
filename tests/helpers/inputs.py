"""Batches for the tiny models, made as the real processors make them.

A prompt is a list of pieces: words, images, videos. The content of a prompt hangs on its own seed
alone, so that a sample is the same alone as in any batch, with either padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers import tiny
from tests.helpers.tiny import is_llava

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Words:
    """``count`` random words, or ``period`` random words over and over."""

    count: int
    period: int | None = None


@dataclass(frozen=True)
class Image:
    """An image of ``height`` x ``width`` visual tokens (llava: 6 x 6 whatever is asked)."""

    height: int = tiny.CLIP_SIDE
    width: int = tiny.CLIP_SIDE


@dataclass(frozen=True)
class Video:
    """A video of ``frames`` x ``height`` x ``width`` visual tokens; Qwen2-VL only."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Prompt:
    """One sample."""

    pieces: tuple[Words | Image | Video, ...]
    seed: int = 0


def prompt(*pieces: Words | Image | Video, seed: int = 0) -> Prompt:
    """Shorthand."""
    return Prompt(pieces, seed)


SINGLE = (prompt(Words(3), Image(4, 6), Words(9), seed=1),)
TWO_IMAGES = (prompt(Words(3), Image(4, 6), Words(4), Image(6, 8), Words(7), seed=2),)
NO_IMAGE = (prompt(Words(11), seed=3), prompt(Words(6), seed=4))
SAME_SIZE = (
    prompt(Words(3), Image(4, 6), Words(9), seed=1),
    prompt(Words(3), Image(4, 6), Words(9), seed=5),
)
MIXED = (
    prompt(Words(3), Image(4, 6), Words(9), seed=1),
    prompt(Words(2), Image(4, 6), Words(4), Image(6, 8), Words(5), seed=6),
    prompt(Words(13), seed=7),
    prompt(Words(5), Image(6, 8), Words(3), seed=8),
)
RAGGED = (  # every sample has an image
    prompt(Words(2), Image(6, 8), Words(4), seed=9),
    prompt(Words(6), Image(4, 6), Words(12), seed=10),
)
VIDEO = (
    prompt(Words(3), Video(3, 4, 4), Words(8), seed=11),
    prompt(Words(2), Image(4, 6), Words(2), Video(2, 4, 6), Words(6), seed=12),
)


def batch(
    model: PreTrainedModel, prompts: Sequence[Prompt], padding: str = "left", *, pad_by: int = 0
) -> Inputs:
    """The prompts as keyword arguments of ``model(...)`` and ``model.generate(...)``.

    Args:
        padding: "left" or "right".
        pad_by: padding beyond what the longest prompt needs.
    """
    llava = is_llava(model)
    made = [_Sample(one, llava) for one in prompts]
    length = max(len(sample.ids) for sample in made) + pad_by
    rows = {"input_ids": [], "attention_mask": [], "mm_token_type_ids": []}
    for sample in made:
        gap = length - len(sample.ids)
        before, after = (gap, 0) if padding == "left" else (0, gap)
        rows["input_ids"].append([tiny.PAD] * before + sample.ids + [tiny.PAD] * after)
        rows["attention_mask"].append([0] * before + [1] * len(sample.ids) + [0] * after)
        rows["mm_token_type_ids"].append([0] * before + sample.types + [0] * after)
    inputs = {name: torch.tensor(values) for name, values in rows.items()}
    images = [image for sample in made for image in sample.images]
    videos = [video for sample in made for video in sample.videos]
    if llava:
        del inputs["mm_token_type_ids"]
        if images:
            inputs["pixel_values"] = torch.stack([pixels for pixels, _ in images])
        return inputs
    if images:
        inputs["pixel_values"] = torch.cat([pixels for pixels, _ in images])
        inputs["image_grid_thw"] = torch.tensor([grid for _, grid in images])
    if videos:
        inputs["pixel_values_videos"] = torch.cat([pixels for pixels, _ in videos])
        inputs["video_grid_thw"] = torch.tensor([grid for _, grid in videos])
    return inputs


def visual_mask(inputs: Inputs) -> Tensor:
    """(B, L) bool: image and video placeholders."""
    return (inputs["input_ids"] == tiny.IMAGE) | (inputs["input_ids"] == tiny.VIDEO)


def real_mask(inputs: Inputs) -> Tensor:
    """(B, L) bool: everything but padding."""
    return inputs["attention_mask"].bool()


def extended(inputs: Inputs, new_ids: Tensor) -> Inputs:
    """The same inputs with (B, n) more words behind each."""
    tails = {
        "input_ids": new_ids,
        "attention_mask": torch.ones_like(new_ids),
        "mm_token_type_ids": torch.zeros_like(new_ids),
    }
    return {
        name: torch.cat([value, tails[name]], 1) if name in tails else value
        for name, value in inputs.items()
    }


class _Sample:
    """Ids, token types and pixels of one prompt."""

    def __init__(self, source: Prompt, llava: bool) -> None:
        self.generator = torch.Generator().manual_seed(1000 + source.seed)
        self.llava = llava
        self.ids: list[int] = [tiny.BOS]
        self.types: list[int] = [0]
        self.images: list[tuple[Tensor, list[int]]] = []
        self.videos: list[tuple[Tensor, list[int]]] = []
        for piece in source.pieces:
            if isinstance(piece, Words):
                self._words(piece)
            elif isinstance(piece, Image):
                self._image(piece)
            else:
                self._video(piece)

    def _words(self, piece: Words) -> None:
        period = piece.period or piece.count
        drawn = torch.randint(tiny.FIRST_WORD, tiny.VOCAB, (period,), generator=self.generator)
        repeated = drawn.repeat(piece.count // period + 1)[: piece.count]
        self._append(repeated.tolist(), 0)

    def _image(self, piece: Image) -> None:
        if self.llava:
            size = (3, tiny.CLIP_IMAGE, tiny.CLIP_IMAGE)
            self.images.append((torch.randn(size, generator=self.generator), []))
            self._append([tiny.IMAGE] * tiny.CLIP_SIDE**2, 1)
            return
        self.images.append(self._patches(1, piece.height, piece.width))
        self._visual(tiny.IMAGE, piece.height * piece.width, 1)

    def _video(self, piece: Video) -> None:
        assert not self.llava, "llava has no videos"
        self.videos.append(self._patches(piece.frames, piece.height, piece.width))
        self._visual(tiny.VIDEO, piece.frames * piece.height * piece.width, 2)

    def _patches(self, frames: int, height: int, width: int) -> tuple[Tensor, list[int]]:
        grid = [frames, height * tiny.QWEN_MERGE, width * tiny.QWEN_MERGE]
        patches = grid[0] * grid[1] * grid[2]
        size = 3 * tiny.QWEN_FRAMES * tiny.QWEN_PATCH**2
        return torch.randn(patches, size, generator=self.generator), grid

    def _visual(self, token_id: int, count: int, token_type: int) -> None:
        self._append([tiny.VISION_START], 0)
        self._append([token_id] * count, token_type)
        self._append([tiny.VISION_END], 0)

    def _append(self, ids: list[int], token_type: int) -> None:
        self.ids += ids
        self.types += [token_type] * len(ids)
