"""Questions to a model with VoCo tokens, which reads an image once for all questions about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from atp_patch.evaluation.answers import hits
from atp_patch.evaluation.prepare import Sample, collate, divide
from atp_patch.patching.api import is_patched, last_trace, require_patch
from atp_patch.tools.visual_cache import compress

_TEXT = ("input_ids", "attention_mask")


def reads_images_once(model: Any, samples: Sequence[Sample]) -> bool:
    """Return whether each image can be read once for all questions about it.

    The model has VoCo tokens, the features of each sample's image were computed before, and the
    true answers are known.
    """
    has_voco = is_patched(model) and require_patch(model).voco is not None
    return has_voco and all(s.features is not None and s.answer for s in samples)


def forced_by_image(
    model: Any, samples: Sequence[Sample], pad_id: int
) -> Iterator[tuple[bool, Tensor]]:
    """Answer samples as :func:`answers.forced` does, with each image read once.

    Yields:
        for each sample whether its true answer would be given, and the (layers,) tokens that its
        image left in each decoder layer.
    """
    for _, same in groupby(samples, key=lambda sample: sample.example.number):
        asked = list(same)
        image = collate([divide(asked[0])[0]], pad_id, False, False, seen=True).inputs
        cache = compress(model, image)
        left = last_trace(model).tokens_per_layer[0]
        batch = collate([divide(sample)[1] for sample in asked], pad_id, False, False)
        question = {name: batch.inputs[name] for name in _TEXT}
        with torch.inference_mode():
            found = hits(model, cache.inputs(model, question), batch)
        yield from ((hit, left) for hit in found)
