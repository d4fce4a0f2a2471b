"""Images that are read once for all questions about them.

In a causal decoder nothing that stands before a question depends on it, and neither does what a
method before the decoder keeps of an image, unless the method reads the question. So the prompt up
to the end of its image is read once, and each question goes on from a copy of that cache.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from atp_patch.contract import TowerTokens
from atp_patch.evaluation.answers import hits
from atp_patch.evaluation.prepare import Sample, collate, divide
from atp_patch.patching.api import is_patched, require_patch
from atp_patch.seam import CACHE_ARGUMENT, ReadingHooks


def keeps_the_same(model: Any) -> bool:
    """Return whether the model as it is patched now keeps the same of an image whatever is asked
    about it.

    VoCo tokens do too, but are read in a way of their own.
    """
    if not is_patched(model):
        return True
    methods = require_patch(model).plan.methods
    if methods.layer is not None or methods.voco is not None:
        return False
    return methods.door is None or not methods.door.reads_question


def begin_alike(samples: Sequence[Sample]) -> bool:
    """Return whether all prompts about an image are the same up to its end: the questions stand
    behind.
    """
    begun: dict[int, Tensor] = {}
    for sample in samples:
        ids = divide(sample)[0].inputs["input_ids"]
        if not torch.equal(begun.setdefault(sample.example.number, ids), ids):
            return False
    return True


@dataclass(frozen=True)
class ReadImages:
    """Images that a model has read, each with the prompt before it.

    Attributes:
        model: the model.
        begun: for each image, the beginning of a sample, up to the image's end.
        cache: their keys and values.
        mask: (B, P) the attention mask of what is cached.
        following: (B,) int64 position of the token that follows each image.
        flat: whether the position of a token is one number.
    """

    model: Any
    begun: tuple[Sample, ...]
    cache: DynamicCache
    mask: Tensor
    following: Tensor
    flat: bool

    def row(self, sample: Sample) -> int:
        """Return the number of the image that a sample asks about."""
        return [image.example.number for image in self.begun].index(sample.example.number)

    def hits(self, samples: Sequence[Sample], pad_id: int) -> list[bool]:
        """Return whether greedy generation would give each sample's true answer, as ``forced`` says
        it.

        Args:
            samples: questions about these images.
            pad_id: the token id that fills shorter questions up.
        """
        rows = torch.tensor([self.row(sample) for sample in samples], device=self.mask.device)
        batch = collate([divide(sample)[1] for sample in samples], pad_id, False, False)
        mask = batch.inputs["attention_mask"]
        place = self.following[rows][:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            cache = deepcopy(self.cache)
            cache.batch_select_indices(rows)
            inputs = {
                "input_ids": batch.inputs["input_ids"],
                "attention_mask": torch.cat([self.mask[rows].to(mask), mask], 1),
                "position_ids": place if self.flat else place.expand(3, -1, -1),
                CACHE_ARGUMENT: cache,
            }
            return hits(self.model, inputs, batch)


class ImagesOnce:
    """Reads images, and keeps what the vision tower showed of them for further methods."""

    def __init__(self) -> None:
        self._shown: dict[Hashable, Mapping[float, TowerTokens]] = {}

    def forget(self) -> None:
        """Drop what the tower showed, because other images follow."""
        self._shown.clear()

    def read(self, model: Any, samples: Sequence[Sample], pad_id: int, flat: bool) -> ReadImages:
        """Read the image of each sample once.

        Args:
            model: a model of which :func:`keeps_the_same` is true.
            samples: questions about images of one group of tasks.
            pad_id: as in :func:`collate`.
            flat: whether the position of a token is one number.
        """
        first = {sample.example.number: sample for sample in reversed(samples)}
        begun = tuple(divide(sample)[0] for sample in first.values())
        cache = DynamicCache(config=model.config.get_text_config())
        with self._shown_again(model, tuple(first)) as shown, torch.inference_mode():
            seen = shown and all(sample.features is not None for sample in begun)
            inputs = collate(begun, pad_id, False, flat, seen).inputs
            model(**inputs, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        mask = inputs["attention_mask"]
        if flat:
            following = inputs["position_ids"][:, -1] + 1
        else:
            base = getattr(model, model.base_model_prefix)
            following = mask.sum(1) + base.rope_deltas[:, 0]
        return ReadImages(model, begun, cache, mask, following, flat)

    @contextmanager
    def _shown_again(self, model: Any, images: Hashable) -> Iterator[bool]:
        """Give a method that reads the tower what the tower showed another one of these images.

        Yields:
            whether the tower need not run, where the images' features are known.
        """
        hooks = require_patch(model).seam.vision if is_patched(model) else None
        if not isinstance(hooks, ReadingHooks):
            yield True
            return
        key = (images, *hooks.blocks.items(), hooks.every_query, hooks.keeps_states)
        known, read = self._shown.get(key), hooks.read

        def kept(*args: Any) -> Mapping[float, TowerTokens]:
            self._shown[key] = read(*args)
            return self._shown[key]

        vars(hooks)["read"] = kept if known is None else lambda *args: known
        try:
            yield known is not None
        finally:
            del vars(hooks)["read"]
