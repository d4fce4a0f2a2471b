"""Running the tiny models: patched, generating, and in a conversation by hand on one cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import atp_patch
from atp_patch.methods import METHODS as CLASSES
from atp_patch.methods import LayerMethod
from atp_patch.seam import CACHE_ARGUMENT
from tests.helpers import tiny
from tests.helpers.inputs import Inputs, extended, real_mask
from tests.helpers.oracle import Kept, masked_logits

LAYERS = (2, 4, 6)
SHARES = (0.5, 0.5, 1 / 3)  # whole numbers of tokens for 24, 36, 48 and 72
FASTV: dict[str, Any] = {"method": "fastv", "layers": LAYERS, "keep": SHARES}
METHODS: dict[str, dict[str, Any]] = {
    "fastv": FASTV,
    "atp": {"method": "atp", "layers": LAYERS, "keep": SHARES},
    "fixed": {"method": "fixed", "layers": LAYERS, "keep": SHARES},
    "sparsevlm": {"method": "sparsevlm", "layers": LAYERS, "keep": SHARES, "recycle_share": 0.0},
    "random": {"method": "random", "layers": LAYERS, "keep": SHARES, "seed": 0},
    "uniform": {"method": "uniform", "layers": LAYERS, "keep": SHARES},
}
INSIDE = tuple(cls.name for cls in CLASSES if issubclass(cls, LayerMethod))
BEFORE = tuple(cls.name for cls in CLASSES if not issubclass(cls, LayerMethod))
TOLERANCE = 1e-5


def patched(kind: str, attention: str = "sdpa", **options: Any) -> PreTrainedModel:
    """A fresh patched tiny model; ``fastv`` with three pruning layers unless told otherwise."""
    return atp_patch.patch_model(tiny.tiny_model(kind, attention), **(options or FASTV))


def forward(model: PreTrainedModel, inputs: Inputs, **kwargs: Any) -> Any:
    """The model's outputs without gradients."""
    with torch.no_grad():
        return model(**inputs, **kwargs)


def kept_of(model: PreTrainedModel) -> dict[int, Tensor]:
    """What the last forward pass with images kept at each pruning layer: (B, L) bool."""
    layers = atp_patch.last_trace(model).layers
    return {number: layer.kept.clone() for number, layer in layers.items()}


def generate(model: PreTrainedModel, inputs: Inputs, tokens: int = 4, **kwargs: Any) -> Any:
    """``generate``, greedy unless told otherwise, with the same random numbers in every call."""
    torch.manual_seed(0)
    if "past_key_values" in kwargs:
        kwargs[CACHE_ARGUMENT] = kwargs.pop("past_key_values")
    return model.generate(**inputs, **{"max_new_tokens": tokens, "do_sample": False, **kwargs})


def new_ids(inputs: Inputs, sequences: Tensor) -> Tensor:
    """The generated part of what ``generate`` returns."""
    return sequences[:, inputs["input_ids"].shape[1] :]


def words(batch: int, count: int, seed: int = 0) -> Tensor:
    """(batch, count) random words, as somebody's next message."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(tiny.FIRST_WORD, tiny.VOCAB, (batch, count), generator=generator)


class Session:
    """A conversation with one model on one cache, fed by hand; every answer can be checked.

    Position ids are given as ``generate`` gives them, so that paddings on either side are right and
    conversations in turn do not share the model's ``rope_deltas``.
    """

    def __init__(
        self, model: PreTrainedModel, inputs: Inputs, cache: Any = None, **kwargs: Any
    ) -> None:
        self.model, self.inputs = model, dict(inputs)
        out = forward(
            model, positioned(model, inputs), past_key_values=cache, use_cache=True, **kwargs
        )
        self.cache, self.logits = out.past_key_values, out.logits
        self.deltas = _deltas(model, inputs)

    def feed(self, ids: Tensor, **kwargs: Any) -> Tensor:
        """(B, n, vocabulary) logits of n more tokens."""
        self.inputs = extended(self.inputs, ids)
        mask = self.inputs["attention_mask"]
        text = _text_positions(mask)[:, -ids.shape[1] :]
        out = forward(
            self.model,
            {"input_ids": ids, "attention_mask": mask},
            position_ids=_position_ids(self.model, text, self.deltas),
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        )
        return out.logits

    def fork(self) -> Session:
        """The same conversation on a deep copy of the cache."""
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        return twin

    def reference(self, plain: PreTrainedModel, kept: Kept) -> Tensor:
        """(B, L, vocabulary) logits of the masked full-length plain model for all that was fed."""
        return masked_logits(plain, positioned(plain, self.inputs), kept)

    def next_ids(self) -> Tensor:
        """(B, 1) likeliest first words after the prompt, whichever side its padding is on."""
        real = real_mask(self.inputs)
        place = torch.arange(real.shape[1])
        last = torch.where(real, place, -1).amax(1)
        logits = self.logits[torch.arange(len(last)), last]
        return logits[:, tiny.FIRST_WORD :].argmax(-1, keepdim=True) + tiny.FIRST_WORD


def positioned(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The inputs with position ids that skip the padding, where the model does not do so itself."""
    if not tiny.is_llava(model) and _has_grids(inputs):
        return inputs
    text = _text_positions(inputs["attention_mask"])
    deltas = torch.zeros(len(text), 1, dtype=torch.long)
    return {**inputs, "position_ids": _position_ids(model, text, deltas)}


def _has_grids(inputs: Inputs) -> bool:
    return "image_grid_thw" in inputs or "video_grid_thw" in inputs


def _deltas(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    if tiny.is_llava(model) or not _has_grids(inputs):
        return torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long)
    return model.model.rope_deltas.clone()


def _text_positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _position_ids(model: PreTrainedModel, text: Tensor, deltas: Tensor) -> Tensor:
    if tiny.is_llava(model):
        return text
    return torch.cat([text[None], (text + deltas)[None].expand(3, -1, -1)])
