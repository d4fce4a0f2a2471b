"""Rows for training the decoder: a picture, and many questions about it one after another.

Each question sees the picture and itself, but no other question, so the picture is read once for
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp_patch.builtin.documents import KINDS
from atp_patch.builtin.dynamic.sizes import TOKEN_PX
from atp_patch.builtin.scenes import Question, scene_rng
from atp_patch.builtin.smol.processing import image_rows
from workshop.batches import Batch
from workshop.labels import IGNORE
from workshop.smol.pictures import SCENE, make_picture
from workshop.smol.windows import pieces_of

KINDS_ASKED: tuple[str, ...] = (
    "page",
    "page",
    "page",
    "table",
    "table",
    "chart",
    "map",
    "icons",
    SCENE,
)
"""Kinds of pictures, as often as they are shown."""
_STREAM = 4002  # stream of random numbers; pictures and windows use others


@dataclass(frozen=True)
class RowSpec:
    """The contents of rows.

    Attributes:
        base: folder of the decoder.
        questions: largest number of questions in a row.
        sides_px: widths and heights of documents.
        kinds: kinds of pictures, as often as they are shown.
        split: "train", "development" or "test".
        offset: number of the first picture.
        rounds: number of times that each task is asked about.
    """

    base: Path
    questions: int = 10
    sides_px: tuple[int, ...] = (192, 224, 256)
    kinds: tuple[str, ...] = KINDS_ASKED
    split: str = "train"
    offset: int = 10_000_000
    rounds: int = 2


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, with the kind of picture before a slash."""
    from atp_patch.builtin.vocabulary import TASKS

    named = [f"{kind}/{task}" for kind, made in KINDS.items() for task in made.tasks]
    return (*named, *(f"{SCENE}/{task}" for task in TASKS))


def make_row(spec: RowSpec, number: int) -> Batch:
    """Make row ``number``.

    Returns:
        ``pixels``: (height, width, 3) uint8; ``pieces``: (patches,) int64 in raster order; and of
        the L tokens of the questions: ``ids``, ``targets`` (the next token where it belongs to an
        answer, else IGNORE), ``question`` (the number of the question), ``place`` (in the
        question) and of each question ``task``, its number in `task_names`.
    """
    index = spec.offset + number
    rng = scene_rng(spec.split, index, _STREAM)
    kind = spec.kinds[int(rng.integers(len(spec.kinds)))]
    width, height = (spec.sides_px[int(k)] for k in rng.integers(len(spec.sides_px), size=2))
    picture = make_picture(kind, spec.split, index, rounds=spec.rounds, size_px=(width, height))
    pieces = pieces_of(spec.base)
    height, width = (side // TOKEN_PX * TOKEN_PX for side in picture.clean.shape[:2])
    order = rng.permutation(len(picture.questions))[: spec.questions]
    asked = [picture.questions[int(place)] for place in order]
    row: Batch = {
        "pixels": picture.pixels(rng, 0, 0, (width, height)),
        "pieces": picture.labels(pieces, 0, 0, (width, height)).pieces.reshape(-1),
        "task": np.array([task_names().index(f"{kind}/{q.task}") for q in asked]),
    }
    return row | _texts(pieces.tokenizer, asked)


def _texts(tokenizer: PreTrainedTokenizerBase, asked: list[Question]) -> Batch:
    columns: dict[str, list[int]] = {"ids": [], "targets": [], "question": [], "place": []}
    for number, question in enumerate(asked):
        before = f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
        told = tokenizer(before)["input_ids"]
        answer = tokenizer(f"{question.answer}<|im_end|>")["input_ids"]
        ids = [*told, *answer]
        columns["ids"] += ids[:-1]
        columns["targets"] += [IGNORE] * (len(told) - 1) + answer
        columns["question"] += [number] * (len(ids) - 1)
        columns["place"] += range(len(ids) - 1)
    return {name: np.array(values, dtype=np.int64) for name, values in columns.items()}


def image_ids(tokenizer: PreTrainedTokenizerBase, rows: int, columns: int) -> list[int]:
    """Return the ids of a prompt up to the image's end, with a placeholder for each visual token.

    Args:
        tokenizer: the decoder's.
        rows, columns: size of the grid of visual tokens.
    """
    ids: list[int] = tokenizer(f"<|im_start|>user\n{image_rows(rows, columns)}")["input_ids"]
    return ids


def packed_mask(prefix: int, question: NDArray[np.generic]) -> Tensor:
    """(1, 1, prefix + L, prefix + L) bool, true where a token sees another one.

    Args:
        prefix: number of tokens before the questions, which all of them see.
        question: (L,) the number of the question that each token belongs to.
    """
    of = torch.cat([torch.full((prefix,), -1), torch.as_tensor(question)])
    same = (of[:, None] == of) | (of == -1)
    return same.tril()[None, None]
