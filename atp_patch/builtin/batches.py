"""Training batches: scenes turned into arrays, made in a process of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from atp_patch.builtin.labels import (
    HOLDS_FIELDS,
    IGNORE,
    NOUN_FIELDS,
    SIDE_FIELDS,
    noun_labels,
    patch_cores,
    patch_labels,
    patch_owners,
    patch_places,
    side_labels,
)
from atp_patch.builtin.questions import ask
from atp_patch.builtin.scenes import IMAGE_PX, SceneConfig, make_scene, scene_rng
from atp_patch.builtin.tokens import ASSISTANT, EOS, PAD, encode, word_ids
from atp_patch.builtin.vocabulary import MAX_OBJECTS, TASKS

TEXT_LENGTH = 13
"""Tokens of the longest question with its answer and `</s>`."""

Batch = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class BatchSpec:
    """What a batch holds. Batch number k holds scenes k * images to (k + 1) * images - 1."""

    images: int
    views: int = 1
    """Sets of questions asked of the same image."""
    questions: int = 12
    tasks: tuple[str, ...] = (*TASKS, "count", "ocr", "relation", "exist", "common", "size")
    """Tried in this order after a shuffle, until there are `questions` of them."""
    with_patch_labels: bool = False
    with_owners: bool = False
    """Whether to say which patches show what a token of a question names."""
    split: str = "train"
    offset: int = 0
    """Index of the first scene."""
    scenes: SceneConfig = field(default_factory=SceneConfig)


def make_batch(spec: BatchSpec, number: int) -> Batch:
    """Batch `number`: pixels (images, 192, 192, 3) uint8 and, for each image and view, questions.

    `ids` and `targets` are (images * views, questions, TEXT_LENGTH): question, `ASSISTANT:`,
    answer, `</s>`; a target is the *next* token where that belongs to the answer, else IGNORE.
    `nouns` is (images * views, questions, TEXT_LENGTH, NOUN_FIELDS); `task` is the index in TASKS.
    `owners` is (images, 576); `gaze` is (images * views, questions, TEXT_LENGTH, 2): owners, a
    bit each, that a noun names, and those that the token before a sign's character should see.
    `sides` is (images * views, questions, TEXT_LENGTH, SIDE_FIELDS and HOLDS_FIELDS), told at the
    second noun of a question; `back` is (images * views, questions, TEXT_LENGTH), how many tokens
    before that noun the first one stands, 0 elsewhere. `cores` is (images, 576).
    """
    rows = spec.images * spec.views
    shape = (rows, spec.questions, TEXT_LENGTH)
    batch: Batch = {
        "pixels": np.zeros((spec.images, IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8),
        "ids": np.full(shape, word_ids()[PAD]),
        "targets": np.full(shape, IGNORE),
        "nouns": np.full((*shape, len(NOUN_FIELDS)), IGNORE, dtype=np.int16),
        "sides": np.full((*shape, len(SIDE_FIELDS) + len(HOLDS_FIELDS)), IGNORE, dtype=np.int16),
        "back": np.zeros(shape, dtype=np.int64),
        "task": np.full(shape[:2], IGNORE),
    }
    labels, owners, cores, places = [], [], [], []
    gaze = np.zeros((*shape, 2), dtype=np.int32)
    for i in range(spec.images):
        index = spec.offset + number * spec.images + i
        scene = make_scene(spec.split, index, spec.scenes, tasks=())
        batch["pixels"][i] = np.asarray(scene.image)
        if spec.with_patch_labels:
            labels.append(patch_labels(scene.layout))
            places.append(patch_places(scene.layout))
        if spec.with_owners:
            owners.append(patch_owners(scene.layout))
            cores.append(patch_cores(scene.layout))
        for view in range(spec.views):
            row = i * spec.views + view
            rng = scene_rng(spec.split, index, 3 + view)
            order = [spec.tasks[int(k)] for k in rng.permutation(len(spec.tasks))]
            asked = ask(scene.layout, rng, tuple(order))[: spec.questions]
            for j, question in enumerate(asked):
                prompt = [*encode(question.text), word_ids()[ASSISTANT]]
                answer = [*encode(question.answer), word_ids()[EOS]]
                length = len(prompt) + len(answer)
                batch["ids"][row, j, :length] = prompt + answer
                batch["targets"][row, j, len(prompt) - 1 : length - 1] = answer
                batch["task"][row, j] = TASKS.index(question.task)
                for k, values, named in noun_labels(question.text, scene.layout):
                    batch["nouns"][row, j, k] = values
                    gaze[row, j, k, 0] = named
                pair = side_labels(question.text, scene.layout)
                if pair is not None:
                    first, second, sides = pair
                    batch["sides"][row, j, second] = sides
                    batch["back"][row, j, second] = second - first
                if question.task == "ocr":
                    for place in range(len(answer) - 1):
                        gaze[row, j, len(prompt) - 1 + place, 1] = 1 << (MAX_OBJECTS + place)
    if spec.with_patch_labels:
        batch |= {"labels": np.stack(labels), "places": np.stack(places)}
    if spec.with_owners:
        batch |= {"owners": np.stack(owners), "cores": np.stack(cores), "gaze": gaze}
    return batch


def _work(job: tuple[BatchSpec, int]) -> Batch:
    return make_batch(*job)


def batches(spec: BatchSpec, first: int, stop: int) -> Iterator[Batch]:
    """Batches `first` to `stop - 1`, drawn ahead in a second process."""
    # "spawn": a fork of a process whose torch threads already run may hang.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pending = [
            pool.apply_async(_work, ((spec, k),)) for k in range(first, min(first + 4, stop))
        ]
        for number in range(first, stop):
            yield pending.pop(0).get()
            if number + 4 < stop:
                pending.append(pool.apply_async(_work, ((spec, number + 4),)))
