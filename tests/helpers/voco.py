"""VoCo-LLaMA stated plainly: one sample and one token at a time, on the plain model.

Nothing here knows how the package does it. The sequence with VoCo tokens is written out, the mask
is filled entry by entry, and the plain model's own decoder runs on it at full length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import atp_patch
from tests.helpers import tiny
from tests.helpers.inputs import Inputs, real_mask, visual_mask


@dataclass
class Token:
    """``kind`` is "text", "visual" or "voco"; ``place`` is the given token that it stands at."""

    kind: str
    segment: int
    place: int
    number: int = -1


def written_out(
    visual: list[bool], attended: list[bool], num_tokens: int, cuts: Collection[int] = ()
) -> list[Token]:
    """The tokens of one sample without padding, VoCo tokens behind every run of visual ones.

    Args:
        cuts: places at which a new segment begins within a run.
    """
    tokens: list[Token] = []
    segment = -1
    for place, is_visual in enumerate(visual):
        if not attended[place]:
            continue
        if not is_visual:
            tokens.append(Token("text", -1, place))
            continue
        if place == 0 or not visual[place - 1] or place in cuts:
            segment += 1
        tokens.append(Token("visual", segment, place))
        if place + 1 == len(visual) or not visual[place + 1] or place + 1 in cuts:
            for number in range(num_tokens):
                tokens.append(Token("voco", segment, place - num_tokens + 1 + number, number))
    return tokens


def sees(tokens: list[Token], query: int, key: int) -> bool:
    """Whether one token sees another."""
    if key > query:
        return False
    if tokens[key].kind != "visual":
        return True
    return tokens[query].kind != "text" and tokens[query].segment == tokens[key].segment


def reference(
    model: PreTrainedModel,
    inputs: Inputs,
    embedding: Tensor,
    cuts: Sequence[Collection[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of the plain model with VoCo tokens behind its images.

    Args:
        inputs: with position ids, where the model needs them to skip padding.
        embedding: (V, D).
        cuts: of each sample, places at which a new segment begins within a run.

    Returns:
        (B, L, vocabulary), at the place of one of the last visual tokens that of the VoCo token,
        and (B, L) bool: where there is something to compare.
    """
    embeds, positions = _decoder_inputs(model, inputs)
    batch, length = inputs["input_ids"].shape
    logits = embeds.new_zeros(batch, length, model.config.get_text_config().vocab_size)
    known = torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch):
        tokens = written_out(
            visual_mask(inputs)[b].tolist(),
            real_mask(inputs)[b].tolist(),
            len(embedding),
            () if cuts is None else cuts[b],
        )
        rows = [embedding[t.number] if t.kind == "voco" else embeds[b, t.place] for t in tokens]
        mask = torch.full((len(tokens), len(tokens)), torch.finfo(torch.float32).min)
        for q in range(len(tokens)):
            for k in range(len(tokens)):
                if sees(tokens, q, k):
                    mask[q, k] = 0.0
        places = torch.tensor([t.place for t in tokens])
        with torch.no_grad():
            states = model.model.language_model(
                inputs_embeds=torch.stack(rows)[None],
                position_ids=positions[..., b : b + 1, :][..., places],
                attention_mask=mask[None, None],
                use_cache=False,
            ).last_hidden_state
            made = model.lm_head(states)[0]
        for slot, token in enumerate(tokens):  # a VoCo token comes later and takes the place
            logits[b, token.place] = made[slot]
            known[b, token.place] = True
    return logits, known


def _decoder_inputs(model: PreTrainedModel, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Embeddings with the visual features among them, and (..., B, L) position ids."""
    assert model.config.get_text_config()._attn_implementation == "eager"
    seen: dict[str, Any] = {}

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    positions = seen["position_ids"]
    if positions is None:
        positions = torch.arange(seen["inputs_embeds"].shape[1])[None]
    batch = len(inputs["input_ids"])
    return seen["inputs_embeds"], positions.expand(*positions.shape[:-2], batch, -1)


def voco_model(kind: str, attention: str = "sdpa", num_tokens: int = 2, **options: Any) -> Any:
    """A tiny model with VoCo tokens, equal in every call."""
    torch.manual_seed(11)
    return atp_patch.patch_model(
        tiny.tiny_model(kind, attention), method="voco", num_tokens=num_tokens, **options
    )
