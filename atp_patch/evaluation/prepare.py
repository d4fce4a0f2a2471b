"""Questions as inputs: each is encoded once, and padded to batches with or without its image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from atp_patch.evaluation.tasks import Example
from atp_patch.tools.generation import end_ids
from atp_patch.tools.loading import encode

Inputs = dict[str, Any]
ENCODED = "mm_encoder_outputs"
PICTURE = "pixel_values"


@dataclass(frozen=True)
class Features:
    """Features of images in the form that a model's ``get_image_features`` returns.

    Attributes:
        pooler_output: (Lv, D) features of each image.
        deepstack_features: features that some models add inside the decoder; there are none here.
    """

    pooler_output: tuple[Tensor, ...]
    deepstack_features: tuple[Tensor, ...] = ()

    def to_tuple(self) -> tuple[tuple[Tensor, ...], ...]:
        """Return the fields in order, as transformers 5.24 asks of such outputs."""
        return self.pooler_output, self.deepstack_features


@dataclass(frozen=True)
class Sample:
    """One encoded question.

    Attributes:
        example: the question.
        inputs: what the processor made: tensors (1, L), or with a row for each image.
        visual: (L,) bool, which is true at the placeholders of visual tokens.
        answer: ids of the true answer and the end token; empty where they are not needed.
        features: (Lv, D) features of its image where ``features.see`` found them ahead, or None.
    """

    example: Example
    inputs: Inputs
    visual: Tensor
    answer: tuple[int, ...] = ()
    features: Tensor | None = None

    @property
    def visual_tokens(self) -> int:
        """How many placeholders of visual tokens the prompt has."""
        return int(self.visual.sum())


@dataclass(frozen=True)
class Batch:
    """Samples padded on the left to one length.

    Attributes:
        inputs: arguments of ``model(...)`` on its device; ``position_ids`` count from 0 at the
            first token of each sample.
        answers: (B, A) ids of the true answers, padded on the right; empty where a sample has none.
        answers_valid: (B, A) bool, which is false at their padding.
    """

    samples: tuple[Sample, ...]
    inputs: Inputs
    answers: Tensor
    answers_valid: Tensor


def prepare(
    model: Any,
    processor: Any,
    example: Example,
    image: Image.Image,
    placeholder_ids: Sequence[int],
    with_answer: bool,
) -> Sample:
    """Encode one question about one image, with tensors on the model's device."""
    inputs: Inputs = {
        name: value
        for name, value in encode(processor, image, example.question, model).items()
        if isinstance(value, Tensor)
    }
    ids = inputs["input_ids"][0]
    visual = torch.isin(ids, torch.tensor(placeholder_ids, device=ids.device))
    answer: tuple[int, ...] = ()
    if with_answer:
        words = processor.tokenizer.encode(example.answer, add_special_tokens=False)
        answer = (*words, end_ids(model)[0])
    return Sample(example, inputs, visual, answer)


def divide(sample: Sample) -> tuple[Sample, Sample]:
    """Return the prompt up to the end of its image, with the image, and the rest, without it."""
    length = sample.inputs["input_ids"].shape
    tokens = {name: t for name, t in sample.inputs.items() if t.shape == length}
    end = int(sample.visual.nonzero().max()) + 1
    before = {name: t[:, :end] for name, t in tokens.items()}
    behind = {name: t[:, end:] for name, t in tokens.items()}
    return (
        replace(sample, inputs={**sample.inputs, **before}, visual=sample.visual[:end]),
        replace(sample, inputs=behind, visual=sample.visual[end:], features=None),
    )


def collate(
    samples: Sequence[Sample], pad_id: int, blind: bool, positions: bool, seen: bool = False
) -> Batch:
    """Pad samples on the left to one batch.

    Args:
        samples: at least one.
        pad_id: the token id that fills shorter prompts up.
        blind: whether to leave the images and their placeholders out. The other tokens then keep
            the position ids that they have with the image, if ``positions`` is true.
        positions: whether to give (B, L) position ids; models with other kinds of ids find theirs
            themselves.
        seen: whether to give the features that were found ahead in place of the images.
    """
    kept = [~sample.visual if blind else torch.ones_like(sample.visual) for sample in samples]
    counts = [int(mask.sum()) for mask in kept]
    length, ids = max(counts), samples[0].inputs["input_ids"]
    sized = [n for n, t in samples[0].inputs.items() if t.shape == ids.shape]
    inputs: Inputs = {
        name: torch.stack(
            [
                _padded(s.inputs[name][0][mask], length, pad_id if name == "input_ids" else 0)
                for s, mask in zip(samples, kept, strict=True)
            ]
        )
        for name in sized
    }
    if positions:
        inputs["position_ids"] = torch.stack(
            [_padded(mask.nonzero()[:, 0], length, 0) for mask in kept]
        )
    if not blind:
        for name in samples[0].inputs.keys() - set(sized) - ({PICTURE} if seen else set()):
            inputs[name] = _together([s.inputs[name] for s in samples])
        if seen:
            inputs[ENCODED] = {
                "image": Features(tuple(s.features for s in samples if s.features is not None))
            }
    longest = max(len(sample.answer) for sample in samples)
    answers = ids.new_full((len(samples), longest), pad_id)
    valid = torch.zeros_like(answers, dtype=torch.bool)
    for row, sample in enumerate(samples):
        answers[row, : len(sample.answer)] = torch.tensor(sample.answer, device=ids.device)
        valid[row, : len(sample.answer)] = True
    return Batch(tuple(samples), inputs, answers, valid)


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors. Of pictures cut into tiles, (1, tiles, ...), those with fewer tiles get
    empty ones, as their processor would add them.
    """
    if len({part.shape[2:] for part in parts}) == 1 and parts[0].ndim > 3:
        most, rest = max(part.shape[1] for part in parts), (0, 0) * (parts[0].ndim - 2)
        parts = [torch.nn.functional.pad(p, (*rest, 0, most - p.shape[1])) for p in parts]
    return torch.cat(list(parts))


def _padded(row: Tensor, length: int, value: int) -> Tensor:
    """Return the row filled up on the left with ``value``, (length,)."""
    return torch.nn.functional.pad(row, (length - row.shape[0], 0), value=value)
