"""Image features, found once an image however many questions are asked about it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from atp_patch.evaluation.prepare import ENCODED, PICTURE, Sample, collate
from atp_patch.methods import TowerMethod
from atp_patch.patching.patch import is_patched, require_patch
from atp_patch.tools.trained import changes_features

_GRID = "image_grid_thw"
_READ = {"input_ids", "attention_mask", "mm_token_type_ids", PICTURE, _GRID}


def can_see_ahead(model: Any, samples: Sequence[Sample]) -> bool:
    """Whether image features can be handed to the model: it takes them, adds none inside the
    decoder, and an image is nothing but one picture.
    """
    takes = ENCODED in inspect.signature(model.forward).parameters
    deep = getattr(model.config.vision_config, "deepstack_visual_indexes", None)
    return takes and not deep and all(set(s.inputs) <= _READ for s in samples)


def see(model: Any, samples: Sequence[Sample], pad_id: int, positions: bool) -> list[Sample]:
    """Find the features of each image once, as the model sees now: merged, if it is patched so.

    Args:
        samples: all of one group of tasks; ``pad_id``, ``positions``: see :func:`collate`.
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
    """Samples with the features that the model as patched now would find, or without any.

    Args:
        samples: with the plain model's features, which are those of methods inside the decoder
            and of VoCo tokens.
        lora: folder of the one that is in the model's weights now.
    """
    before = require_patch(model).before if is_patched(model) else None
    same = lora is None or not changes_features(model, lora)
    if before is None and same:
        return samples
    if before is None or isinstance(before, TowerMethod):
        return see(model, samples, pad_id, positions)
    return [replace(sample, features=None) for sample in samples]
