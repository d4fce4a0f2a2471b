"""Image features that are found once for all questions about an image."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from atp_patch.evaluation.images_once import keeps_the_same
from atp_patch.evaluation.prepare import ENCODED, PICTURE, Sample, collate
from atp_patch.methods import TowerMethod
from atp_patch.patching.api import is_patched, require_patch
from atp_patch.tools.trained import changes_features

_GRID = "image_grid_thw"
_READ = {"input_ids", "attention_mask", "mm_token_type_ids", PICTURE, _GRID}


def can_see_ahead(model: Any, samples: Sequence[Sample]) -> bool:
    """Return whether image features can be handed to the model: it takes them, it adds none inside
    the decoder, and each image is one picture with no further inputs.
    """
    takes = ENCODED in inspect.signature(model.forward).parameters
    deep = getattr(model.config.vision_config, "deepstack_visual_indexes", None)
    return takes and not deep and all(set(s.inputs) <= _READ for s in samples)


def see(model: Any, samples: Sequence[Sample], pad_id: int, positions: bool) -> list[Sample]:
    """Find the features of each image once, as the model makes them now: merged, if its patch
    merges them.

    Args:
        samples: samples of one group of tasks.
        pad_id: as in :func:`collate`.
        positions: as in :func:`collate`.

    Returns:
        the samples with their features.
    """
    first = {sample.example.number: sample for sample in reversed(samples)}
    inputs = collate(list(first.values()), pad_id, False, positions).inputs
    pictures = {name: inputs[name] for name in (PICTURE, _GRID) if name in inputs}
    reading = require_patch(model).seam.reading if is_patched(model) else nullcontext
    with torch.inference_mode(), reading(inputs["input_ids"]):
        base = getattr(model, model.base_model_prefix)
        found = base.get_image_features(**pictures, return_dict=True).pooler_output
    features = dict(zip(first, found, strict=True))
    return [replace(s, features=features[s.example.number]) for s in samples]


def seen_by(
    model: Any, samples: list[Sample], pad_id: int, positions: bool, lora: str | None = None
) -> list[Sample]:
    """Give samples the features that the model finds as it is patched now.

    Args:
        samples: with the plain model's features. Methods inside the decoder and VoCo tokens leave
            these as they are.
        pad_id: as in :func:`collate`.
        positions: as in :func:`collate`.
        lora: folder of the LoRA that is in the model's weights now; None: there is none.

    Returns:
        the samples; without features where the model has to find them in its own forward pass,
        because its images are shrunk, or because a method reads the tower with each question.
    """
    before = require_patch(model).vision_method if is_patched(model) else None
    if is_patched(model) and _reads_the_tower_again(model):
        return [replace(sample, features=None) for sample in samples]
    same = lora is None or not changes_features(model, lora)
    if before is None and same:
        return samples
    if before is None or isinstance(before, TowerMethod):
        return see(model, samples, pad_id, positions)
    return [replace(sample, features=None) for sample in samples]


def _reads_the_tower_again(model: Any) -> bool:
    """Return whether a method at the decoder's door needs the tower to run with each question."""
    door = require_patch(model).plan.methods.door
    return door is not None and bool(door.tower_blocks) and not keeps_the_same(model)
