"""The runner, which has every setting answer the same questions, a few images at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from atp_patch.builtin import DYNAMIC
from atp_patch.builtin.silent import silent_layers, without
from atp_patch.evaluation.answers import forced, generated
from atp_patch.evaluation.features import can_see_ahead, see, seen_by
from atp_patch.evaluation.images_once import ImagesOnce, begin_alike, keeps_the_same
from atp_patch.evaluation.layers_once import LayersOnce
from atp_patch.evaluation.prepare import Inputs, Sample, collate, prepare
from atp_patch.evaluation.progress import Advance
from atp_patch.evaluation.scenes import SETS, scene_image
from atp_patch.evaluation.settings import BLIND, CONTROL_QUESTIONS, Setting, applied
from atp_patch.evaluation.store import Answer, RunFile
from atp_patch.evaluation.tasks import Example, Task
from atp_patch.evaluation.voco import forced_by_image, reads_images_once
from atp_patch.families import family_of
from atp_patch.methods.atp_given import GivenThresholds
from atp_patch.patching.api import last_trace, require_patch
from atp_patch.tools.threshold_controls import controlled, threshold_control

CHUNK_IMAGES = 4
Chunk = list[Example]


@dataclass(frozen=True)
class Bench:
    """A model with what it needs to answer questions.

    Attributes:
        model: the plain model, on its device.
        processor: the model's own.
        speaks: whether the tokenizer is the built-in one, in which a text has one spelling.
        answers: "forced" or "generate" (see the module ``answers``).
        batch_size: the most questions of a forward pass.
        max_new_tokens: the most tokens of a generated answer.
        sized: whether each built-in scene is shown at a size of its own.
    """

    model: Any
    processor: Any
    speaks: bool
    answers: str
    batch_size: int = 16
    max_new_tokens: int = 16
    sized: bool = False

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids of the placeholders of visual tokens."""
        return family_of(self.model.config).placeholder_ids(self.model.config)

    @property
    def pad_id(self) -> int:
        """The id of the token that fills shorter prompts up."""
        return self.processor.tokenizer.pad_token_id or 0

    @cached_property
    def silent(self) -> tuple[int, ...]:
        """The numbers of the decoder layers that add nothing."""
        return silent_layers(self.model)

    @cached_property
    def layers_once(self) -> LayersOnce:
        """Keeps what the layers before the first pruning made of a batch."""
        return LayersOnce()

    @cached_property
    def images_once(self) -> ImagesOnce:
        """Reads images once for all questions about them."""
        return ImagesOnce()

    def skipped(self, setting: Setting) -> set[int]:
        """Return the decoder layers that may be left out of the model as the setting patched it:
        they add nothing, and their attention is not scored.
        """
        layers = () if setting.is_reference else require_patch(self.model).config.layers
        return set(self.silent) - {layer - 1 for layer in layers}

    @contextmanager
    def shortened(self, setting: Setting) -> Iterator[None]:
        """Let the model as the setting patched it skip what is not needed inside this context: the
        layers that add nothing, and layers whose results for this batch are known from another
        setting.
        """
        skipped = self.skipped(setting)
        plain = self.answers == "forced" and setting.lora is None and not setting.is_reference
        again = self.layers_once.given_again(self.model, skipped) if plain else nullcontext()
        with without(self.model, skipped), again:
            yield

    @property
    def flat_positions(self) -> bool:
        """Whether the position of a token is one number, which it is not with M-RoPE."""
        rope = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        return "mrope_section" not in rope


def chunks(tasks: Sequence[Task], split: str, questions: int) -> list[Chunk]:
    """Divide all questions into chunks of a few images each, with all questions about an image in
    the same chunk.

    The division depends on the arguments alone, so that a resumed run has the same batches.
    """
    found: list[Chunk] = []
    for _, members in groupby(sorted(tasks, key=lambda t: t.group), key=lambda t: t.group):
        asked: dict[int, Chunk] = {}
        for task in members:
            for example in task.examples(split, questions):
                asked.setdefault(example.number, []).append(example)
        images = [asked[number] for number in sorted(asked)]
        for start in range(0, len(images), CHUNK_IMAGES):
            found.append([e for image in images[start : start + CHUNK_IMAGES] for e in image])
    return found


def run(
    bench: Bench,
    runs: Sequence[tuple[Setting, RunFile]],
    tasks: Sequence[Task],
    split: str,
    work: Sequence[Chunk],
    advance: Advance,
) -> None:
    """Answer every question that is not answered yet, and write each setting's answers to a chunk
    as soon as they are complete.

    A budget is a share of each image's own visual tokens, so only images with as many of them are
    batched together.

    Args:
        bench: the model.
        runs: each setting with its file.
        tasks: all tasks of the questions.
        split: the split of the questions.
        work: the questions (:func:`chunks`).
        advance: is told how many more answers there are.
    """
    registry = {task.name: task for task in tasks}
    controls = _Controls(bench, tasks)
    for number, chunk in enumerate(work):
        open_runs = [(s, f) for s, f in runs if any(not f.has(e.task, e.number) for e in chunk)]
        if not open_runs:
            continue
        samples = [prepared(bench, registry[e.task], split, e) for e in chunk]
        ahead = bench.answers == "forced" and can_see_ahead(bench.model, samples)
        bench.layers_once.forget()
        bench.images_once.forget()
        if ahead:
            samples = see(bench.model, samples, bench.pad_id, bench.flat_positions)
        for setting, file in open_runs:
            left = [s for s in samples if not file.has(s.example.task, s.example.number)]
            results: dict[str, dict[int, Answer]] = {}
            for visual_tokens in sorted({s.visual_tokens for s in left}):
                alike = [s for s in left if s.visual_tokens == visual_tokens]
                with (
                    applied(bench.model, setting, visual_tokens),
                    controls(setting),
                    bench.shortened(setting),
                ):
                    if ahead:
                        pad_id, positions = bench.pad_id, bench.flat_positions
                        alike = seen_by(bench.model, alike, pad_id, positions, setting.lora)
                    for sample, answer in answered(bench, setting, registry, alike):
                        example = sample.example
                        results.setdefault(example.task, {})[example.number] = answer
            file.add(number, results)
            advance(len(left))


class _Controls:
    """Makes the control of each adapter once."""

    def __init__(self, bench: Bench, tasks: Sequence[Task]) -> None:
        self.bench, self.tasks = bench, tasks
        self._made: dict[Setting, GivenThresholds] = {}

    @contextmanager
    def __call__(self, setting: Setting) -> Iterator[None]:
        """Give the patched model the setting's control inside this context, if it has one."""
        if setting.control is None:
            yield
            return
        model = self.bench.model
        if setting not in self._made:
            with without(model, self.bench.skipped(setting)):
                made = threshold_control(model, list(self._batches()), setting.control)
            self._made[setting] = made
        with controlled(model, self._made[setting]):
            yield

    def _batches(self) -> Iterator[Inputs]:
        each = -(-CONTROL_QUESTIONS // len(self.tasks))
        samples = [
            prepared(self.bench, task, "train", example)
            for task in self.tasks
            for example in task.examples("train", each)
        ]
        for start in range(0, len(samples), self.bench.batch_size):
            part = samples[start : start + self.bench.batch_size]
            yield collate(part, self.bench.pad_id, False, self.bench.flat_positions).inputs


def prepared(bench: Bench, task: Task, split: str, example: Example) -> Sample:
    """Encode one question of a task with its picture."""
    if bench.sized and task.group in SETS:
        image = scene_image(task.group, split, example.number, DYNAMIC)
    else:
        image = task.image(split, example.number)
    may_force = bench.answers == "forced" and task.exact
    return prepare(bench.model, bench.processor, example, image, bench.placeholder_ids, may_force)


def answered(
    bench: Bench, setting: Setting, registry: dict[str, Task], samples: Sequence[Sample]
) -> Iterator[tuple[Sample, Answer]]:
    """Answer samples batch by batch with the model as it is now. A batch holds samples with forced
    answers, or samples whose answers are generated, but not both.
    """
    at_once = setting.name != BLIND and keeps_the_same(bench.model)
    for with_answer in (True, False):
        alike = [sample for sample in samples if bool(sample.answer) == with_answer]
        if alike and with_answer and at_once and begin_alike(alike):
            yield from zip(alike, _answer_by_image(bench, setting, alike), strict=True)
            continue
        for start in range(0, len(alike), bench.batch_size):
            part = alike[start : start + bench.batch_size]
            yield from zip(part, _answer_batch(bench, setting, registry, part), strict=True)


def _answer_by_image(bench: Bench, setting: Setting, samples: Sequence[Sample]) -> Iterator[Answer]:
    """Answer samples with forced answers, reading each image once."""
    images = bench.images_once.read(bench.model, samples, bench.pad_id, bench.flat_positions)
    counts = _entering(bench, setting, images.begun)
    for start in range(0, len(samples), bench.batch_size):
        part = samples[start : start + bench.batch_size]
        hits = images.hits(part, bench.pad_id)
        for sample, hit in zip(part, hits, strict=True):
            yield Answer(float(hit), counts[images.row(sample)])


def _answer_batch(
    bench: Bench, setting: Setting, registry: dict[str, Task], samples: Sequence[Sample]
) -> list[Answer]:
    if reads_images_once(bench.model, samples):
        found = forced_by_image(bench.model, samples, bench.pad_id)
        return [Answer(float(hit), tuple(left[:1].tolist())) for hit, left in found]
    blind = setting.name == BLIND
    seen = samples[0].features is not None and bool(samples[0].answer)
    batch = collate(samples, bench.pad_id, blind, bench.flat_positions, seen)
    bench.layers_once.batch = tuple((s.example.task, s.example.number) for s in samples)
    if samples[0].answer:
        scores = [float(hit) for hit in forced(bench.model, batch)]
    else:
        texts = generated(bench.model, bench.processor, batch, bench.max_new_tokens)
        scores = []
        for sample, text in zip(samples, texts, strict=True):
            task = registry[sample.example.task]
            score = task.score if bench.speaks else task.loose
            scores.append(score(text, sample.example.answer))
    counts = _entering(bench, setting, samples)
    return [Answer(score, row) for score, row in zip(scores, counts, strict=True)]


def _entering(bench: Bench, setting: Setting, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    """Return for each sample the visual tokens that entered layer 0 and each pruning layer."""
    if setting.name == BLIND:
        return [(0,) for _ in samples]
    if setting.is_reference:
        return [(sample.visual_tokens,) for sample in samples]
    trace = last_trace(bench.model)
    rows: torch.Tensor = trace.tokens_per_layer[:, sorted({0, *trace.layers})]
    return [tuple(row) for row in rows.tolist()]
