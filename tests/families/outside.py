"""Tiny models of other packages, and batches as their own code would make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from tests.families import kinds
from tests.families.kinds import TEXT, TOWER, Drawn, Kind, Paint, Place, Sample, stacked
from tests.families.standins import InternVLChatConfig, InternVLChatModel, VilaConfig, VilaModel
from tests.helpers import tiny
from tests.helpers.copies import Template
from tests.helpers.inputs import Inputs

SIDE = 6
OPEN, CLOSE = 6, 7


def _internvl_config(text: PreTrainedConfig, **vision: Any) -> InternVLChatConfig:
    tower = {
        **TOWER,
        "image_size": 48,
        "patch_size": 4,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
    }
    return InternVLChatConfig(PreTrainedConfig(**{**tower, **vision}), text)


def _vila_config(text: PreTrainedConfig) -> VilaConfig:
    """11 x 11 patches, two by two and the border filled up: 6 x 6 tokens."""
    tower = {**TOWER, "image_size": 88, "patch_size": 8}
    return VilaConfig(text, tower, {"mm_projector_type": "mlp_downsample"})


def _tiles(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    tiles = torch.stack([paint(48, 48) for _ in range(1 + 2 * which)])
    drawn = Drawn(tensors={"pixel_values": tiles})
    drawn.mark(OPEN)
    for tile in range(len(tiles)):
        drawn.square(tiny.IMAGE, tile, SIDE, SIDE)
    drawn.mark(CLOSE)
    return drawn


def _images(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """One image, or two that follow each other directly."""
    images = torch.stack([paint(88, 88) for _ in range(1 + which)])
    drawn = Drawn(tensors={"images": images})
    for image in range(len(images)):
        drawn.square(tiny.IMAGE, image, SIDE, SIDE)
        drawn.mark(tiny.IMAGE)  # the newline behind each image
    return drawn


def _flagged(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
    """The original takes no batch without an image."""
    made = stacked("pixel_values")(pictures, inputs)
    return {**made, "image_flags": torch.ones(len(made["pixel_values"]), 1, dtype=torch.long)}


@dataclass
class Given:
    """A batch for a model of another package.

    Attributes:
        forward: keyword arguments of the forward pass; ``generate``: of generation.
        real: (B, L) bool over what the language model gets, False at padding.
        places: of every such position its place in a grid, or None.
    """

    forward: dict[str, Any]
    generate: dict[str, Any]
    real: Tensor
    places: list[list[Place | None]]

    @property
    def placed(self) -> Tensor:
        """(B, L) bool: positions that have a place in a grid."""
        return torch.tensor([[place is not None for place in row] for row in self.places])


@dataclass(frozen=True)
class Case:
    """One model: how it is built, and where its language model is."""

    name: str
    kind: Kind
    decoder: str

    def build(self) -> Any:
        """A fresh copy; equal weights in every call."""
        return _built(self).copy()

    def language_model(self, model: Any) -> Any:
        """The causal language model within."""
        return getattr(model, self.decoder)

    def batch(self, model: Any, samples: Sequence[Sample], padding: str = "left") -> Given:
        """Inputs of the samples; ``model`` is told the side of the padding, where it pads."""
        batch = kinds.make(self.kind, samples, padding)
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        if self.decoder == "language_model":
            rest = {k: v for k, v in batch.inputs.items() if k != "image_flags"}
            return Given(batch.inputs, rest, mask.bool(), batch.places)
        model.padding_side = padding
        given = _collapsed(ids, mask.bool())
        images = batch.inputs.get("images", torch.zeros(0))
        inputs = {**given, "media": {"image": list(images)}, "media_config": {"image": {}}}
        return Given(inputs, inputs, mask.bool(), batch.places)


def _collapsed(ids: Tensor, real: Tensor) -> Inputs:
    """One id for each image and its newline, padded anew on the right."""
    rows = []
    for row, mask in zip(ids, real, strict=True):
        kept, run = [], 0
        for token in row[mask].tolist():
            run = run + 1 if token == tiny.IMAGE else 0
            if token != tiny.IMAGE or run % (SIDE**2 + 1) == 1:
                kept.append(token)
        rows.append(kept)
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    padded = [row + [tiny.PAD] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [[1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


@cache
def _built(case: Case) -> Template:
    torch.manual_seed(0)
    model = case.kind.model(case.kind.config())
    tiny._scale_weights(model)
    if hasattr(model, "img_context_token_id"):
        model.img_context_token_id = tiny.IMAGE
    settings = case.language_model(model).generation_config
    settings.eos_token_id, settings.pad_token_id = None, tiny.PAD
    settings.suppress_tokens = list(range(tiny.FIRST_WORD))
    return Template(model.float().eval())


def _case(
    name: str,
    model: Any,
    config: Callable[[], Any],
    draw: Any,
    collate: Any,
    decoder: str,
) -> Case:
    return Case(name, Kind(name, model, config, draw, collate), decoder)


def internvl_case(text: PreTrainedConfig, name: str, **vision: Any) -> Case:
    """An InternVL-2 object around a language model of this config."""
    make = lambda: _internvl_config(text, **vision)  # noqa: E731
    return _case(name, InternVLChatModel, make, _tiles, _flagged, "language_model")


def _vila_case(text: PreTrainedConfig, name: str) -> Case:
    collate = stacked("images")
    return _case(name, VilaModel, lambda: _vila_config(text), _images, collate, "llm")


CASES = (
    internvl_case(Qwen2Config(**TEXT), "internvl-qwen2"),
    internvl_case(LlamaConfig(**TEXT), "internvl-llama"),
    _vila_case(LlamaConfig(**TEXT), "vila-llama"),
    _vila_case(Qwen2Config(**TEXT), "nvila-qwen2"),
)
