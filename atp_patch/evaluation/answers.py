"""Answers and their scores: generated greedily, or found by asking for the true answer's tokens.

"Forced" answers: the prompt is read into a cache as ``generate`` reads it, and then the true answer
is fed on that cache in one forward pass. The answer counts as given if each of its tokens, and the
end token after it, is the likeliest given the true tokens before it. Greedy generation would have
written exactly these tokens, because up to the first miss both have read the same ones. This says
nothing about what a wrong answer would have been, and it is exact only where a text has one
spelling in tokens, as with the built-in word-level tokenizer; elsewhere answers are generated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from atp_patch.evaluation.prepare import ENCODED, PICTURE, Batch, Inputs
from atp_patch.seam import CACHE_ARGUMENT, cache_in
from atp_patch.tools.generation import GREEDY, end_ids


def forced(model: Any, batch: Batch) -> list[bool]:
    """Return whether greedy generation would give each sample's true answer, in two forward
    passes.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.inference_mode():
        return hits(model, {**_placed(batch.inputs), CACHE_ARGUMENT: cache}, batch)


def hits(model: Any, inputs: Inputs, batch: Batch) -> list[bool]:
    """Return whether greedy generation would give each true answer behind what a cache holds.

    Args:
        inputs: arguments of ``model(...)``, with a cache. The attention mask covers the
            cache and the inputs.
        batch: has the true answers.
    """
    cache, mask = cache_in(inputs), inputs["attention_mask"]
    read = model(**inputs, use_cache=True, logits_to_keep=1)
    predicted = [read.logits[:, -1:].argmax(-1)]
    fed = batch.answers[:, :-1]
    steps = torch.arange(1, fed.shape[1] + 1, device=fed.device)
    output = model(
        input_ids=fed,
        attention_mask=torch.cat([mask, batch.answers_valid[:, :-1].to(mask)], 1),
        position_ids=_last_positions(model, inputs) + steps,
        use_cache=True,
        **{CACHE_ARGUMENT: cache},
    )
    predicted.append(output.logits.argmax(-1))
    right = (torch.cat(predicted, 1) == batch.answers) | ~batch.answers_valid
    return [bool(hit) for hit in right.all(1).tolist()]


def _placed(inputs: Inputs) -> Inputs:
    """Return the inputs, with position ids added for a batch without images.

    A model with M-RoPE works them out itself where there is an image, and would ignore the padding
    where there is none.
    """
    if not inputs.keys().isdisjoint({"position_ids", PICTURE, ENCODED}):
        return inputs
    flat = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs | {"position_ids": flat.expand(3, -1, -1)}


def _last_positions(model: Any, inputs: Inputs) -> Tensor:
    """Return (B, 1) position ids of the last tokens, or (3, B, 1) with M-RoPE."""
    if "position_ids" in inputs:
        last: Tensor = inputs["position_ids"][..., -1:]
        return last
    deltas = getattr(model, model.base_model_prefix).rope_deltas
    return (inputs["attention_mask"].sum(1, keepdim=True) - 1 + deltas).expand(3, -1, -1)


def generated(model: Any, processor: Any, batch: Batch, max_new_tokens: int) -> list[str]:
    """Return the greedy answers as texts, cut at the first end token."""
    ends = end_ids(model)
    with torch.inference_mode():
        ids = model.generate(
            **batch.inputs, **GREEDY, max_new_tokens=max_new_tokens, pad_token_id=ends[0]
        )
    new = ids[:, batch.inputs["input_ids"].shape[1] :]
    return [_text(processor, row, ends) for row in new]


def _text(processor: Any, ids: Tensor, ends: tuple[int, ...]) -> str:
    words = ids.tolist()
    stop = next((at for at, token in enumerate(words) if token in ends), len(words))
    # Special tokens are kept, because an answer with one of them is not the true answer.
    return str(processor.tokenizer.decode(words[:stop], skip_special_tokens=False)).strip()
