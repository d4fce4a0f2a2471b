"""Training batches, which are made from scenes in a second process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from atp_patch.builtin.questions import ask
from atp_patch.builtin.scenes import IMAGE_PX, Layout, Question, SceneConfig, make_scene, scene_rng
from atp_patch.builtin.tokens import ASSISTANT, EOS, PAD, USER, encode, word_ids
from atp_patch.builtin.vocabulary import MAX_OBJECTS, TASKS
from workshop.labels import (
    HOLDS_FIELDS,
    IGNORE,
    NOUN_FIELDS,
    SIDE_FIELDS,
    noun_labels,
    patch_cores,
    patch_labels,
    patch_middles,
    patch_owners,
    patch_places,
    side_labels,
)

TEXT_LENGTH = 15
"""Number of tokens of the longest question with its answer and `</s>`."""

Batch = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class BatchSpec:
    """The contents of batches. Batch number k has scenes k * images to (k + 1) * images - 1."""

    images: int
    views: int = 1
    """Number of sets of questions about each image."""
    questions: int = 12
    tasks: tuple[str, ...] = (*TASKS, "count", "ocr", "relation", "exist", "common", "size")
    """The tasks, which are shuffled and tried until there are `questions` questions."""
    pair_share: float = 0.0
    """Share of the questions that follow another one and its answer, separated by `USER:`."""
    first_counts: bool = True
    """Whether the first answer of such a pair is also a target."""
    with_patch_labels: bool = False
    with_owners: bool = False
    """Whether to include which patches show what a token of a question names."""
    split: str = "train"
    offset: int = 0
    """Index of the first scene."""
    scenes: SceneConfig = field(default_factory=SceneConfig)


Spec = TypeVar("Spec", bound=BatchSpec)


def make_batch(spec: BatchSpec, number: int) -> Batch:
    """Make a batch.

    The number of rows is `images * views`. The entries are:

    - `pixels`: (images, 192, 192, 3) uint8.
    - `ids`: (rows, questions, length), each a question, `ASSISTANT:`, the answer and `</s>`. With
      pairs there is room for two of these and `USER:` between them.
    - `targets`: (rows, questions, length), the *next* token where it belongs to an answer, else
      IGNORE.
    - `task`: (rows, questions), the index in TASKS; that of the second question in a pair.
    - `nouns`: (rows, questions, length, NOUN_FIELDS), labels of nouns.
    - `gaze`: (rows, questions, length, 2), sets of owners as bits: those that a noun names, and
      those that the token before a sign's character should attend to.
    - `sides`: (rows, questions, length, SIDE_FIELDS and HOLDS_FIELDS), labels at the second noun of
      a question.
    - `back`: (rows, questions, length), the distance in tokens from that noun to the first one; 0
      elsewhere.
    - `owners`, `cores`, and `near` and `middle` from `patch_middles`: (images, 576).
    """
    rows = spec.images * spec.views
    length = 2 * TEXT_LENGTH + 1 if spec.pair_share else TEXT_LENGTH
    shape = (rows, spec.questions, length)
    batch: Batch = {
        "pixels": np.zeros((spec.images, IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8),
        "ids": np.full(shape, word_ids()[PAD]),
        "targets": np.full(shape, IGNORE),
        "nouns": np.full((*shape, len(NOUN_FIELDS)), IGNORE, dtype=np.int16),
        "sides": np.full((*shape, len(SIDE_FIELDS) + len(HOLDS_FIELDS)), IGNORE, dtype=np.int16),
        "back": np.zeros(shape, dtype=np.int64),
        "task": np.full(shape[:2], IGNORE),
    }
    batch["gaze"] = np.zeros((*shape, 2), dtype=np.int32)
    labels, owners, cores, places = [], [], [], []
    middles: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
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
            middles.append(patch_middles(scene.layout))
        for view in range(spec.views):
            row = i * spec.views + view
            rng = scene_rng(spec.split, index, 3 + view)
            order = [spec.tasks[int(k)] for k in rng.permutation(len(spec.tasks))]
            asked = list(ask(scene.layout, rng, tuple(order)))
            for j in range(spec.questions):
                if not asked:
                    break
                second = len(asked) > 1 and rng.random() < spec.pair_share
                _write(batch, (row, j), scene.layout, [asked.pop(0) for _ in range(1 + second)])
                if spec.pair_share and not spec.first_counts:
                    starts = np.flatnonzero(batch["ids"][row, j] == word_ids()[USER])
                    until = starts[0] if second else length  # there was no second question
                    batch["targets"][row, j, :until] = IGNORE
    if spec.with_patch_labels:
        batch |= {"labels": np.stack(labels), "places": np.stack(places)}
    if spec.with_owners:
        batch |= {"owners": np.stack(owners), "cores": np.stack(cores)}
        near, share = zip(*middles, strict=True)
        batch |= {"near": np.stack(near), "middle": np.stack(share)}
    return batch


def _write(batch: Batch, slot: tuple[int, int], layout: Layout, turns: list[Question]) -> None:
    """Write questions with their answers one after another into a slot of a batch."""
    at = 0
    for turn in turns:
        if at:
            batch["ids"][(*slot, at)] = word_ids()[USER]
            at += 1
        asked = [*encode(turn.text), word_ids()[ASSISTANT]]
        answer = [*encode(turn.answer), word_ids()[EOS]]
        reply, stop = at + len(asked), at + len(asked) + len(answer)
        batch["ids"][(*slot, slice(at, stop))] = asked + answer
        batch["targets"][(*slot, slice(reply - 1, stop - 1))] = answer
        batch["task"][slot] = TASKS.index(turn.task)
        for k, values, named in noun_labels(turn.text, layout):
            batch["nouns"][(*slot, at + k)] = values
            batch["gaze"][(*slot, at + k, 0)] = named
        pair = side_labels(turn.text, layout)
        if pair is not None:
            first, second, sides = pair
            batch["sides"][(*slot, at + second)] = sides
            batch["back"][(*slot, at + second)] = second - first
        if turn.task == "ocr":
            for place in range(len(answer) - 1):
                batch["gaze"][(*slot, reply - 1 + place, 1)] = 1 << (MAX_OBJECTS + place)
        at = stop


def batches(
    spec: Spec, first: int, stop: int, make: Callable[[Spec, int], Batch] = make_batch
) -> Iterator[Batch]:
    """Give batches `first` to `stop - 1`, which a second process makes ahead."""
    # "spawn", because a fork of a process in which torch threads run may hang.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pending = [pool.apply_async(make, (spec, k)) for k in range(first, min(first + 4, stop))]
        for number in range(first, stop):
            yield pending.pop(0).get()
            if number + 4 < stop:
                pending.append(pool.apply_async(make, (spec, number + 4)))
