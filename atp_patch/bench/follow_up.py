"""A first and a second question about one image: what it saves to have read the image already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from atp_patch.bench.clock import Times, between_ms, mark
from atp_patch.bench.measure import Inputs, cache_bytes
from atp_patch.bench.report import heading, milliseconds
from atp_patch.families import family_of
from atp_patch.patch import patch_model, unpatch_model
from atp_patch.visual_cache import compress

AGAIN, KEPT = "plain, image read again", "plain, KV cache of the image kept"


@dataclass
class Questions:
    """Times to the first token of two questions; ``kept_bytes`` of an image lie between them."""

    first: Times = field(default_factory=Times)
    second: Times = field(default_factory=Times)
    kept_bytes: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt cut behind its image: inputs of the first part, and (B, T) ids of the question."""

    whole: Inputs
    image: Inputs
    question: Tensor

    @classmethod
    def cut(cls, model: Any, inputs: Inputs) -> Prompt:
        """Cut after the last visual token, which stands at one place in all samples."""
        ids = inputs["input_ids"]
        placeholders = torch.tensor(family_of(model.config).placeholder_ids(model.config))
        visual = torch.isin(ids[0], placeholders.to(ids.device))
        length = int(visual.nonzero().max()) + 1
        image = {n: t[:, :length] if t.shape == ids.shape else t for n, t in inputs.items()}
        return cls(inputs, image, ids[:, length:])


def compare_questions(
    model: Any, inputs: Inputs, voco_tokens: Sequence[int], *, runs: int
) -> dict[str, Questions]:
    """Time all ways in turns: the plain model without and with the image's cache kept, and VoCo.

    A second question is the first one's text again: its length is what costs.

    Args:
        inputs: on the model's device; ``voco_tokens``: as many VoCo tokens in turn.
        runs: timed rounds, after one of warm-up.
    """
    prompt = Prompt.cut(model, inputs)
    ways = [AGAIN, KEPT, *(_voco(tokens) for tokens in voco_tokens)]
    found = {way: Questions() for way in ways}
    with torch.inference_mode():
        for run in range(runs + 1):
            for way, tokens in zip(ways, (0, 0, *voco_tokens), strict=True):
                one = found[way]
                if tokens:
                    with _compressing(model, tokens):
                        first_ms, second_ms, one.kept_bytes = _compressed(model, prompt)
                elif way == KEPT:
                    first_ms, second_ms, one.kept_bytes = _kept(model, prompt)
                else:
                    first_ms, second_ms = (_ask(model, **prompt.whole) for _ in range(2))
                if run:
                    one.first.values_ms.append(first_ms)
                    one.second.values_ms.append(second_ms)
    return found


def _voco(tokens: int) -> str:
    return f"voco, {tokens} token{'s' * (tokens > 1)}"


@contextmanager
def _compressing(model: Any, tokens: int) -> Iterator[None]:
    patch_model(model, method="voco", num_tokens=tokens)
    try:
        yield
    finally:
        unpatch_model(model)


def _ask(model: Any, **inputs: Any) -> float:
    """Milliseconds to the logits of the next token."""
    start = mark(inputs["input_ids"].device)
    model(**{"use_cache": True, "logits_to_keep": 1, **inputs})
    return between_ms(start, mark(inputs["input_ids"].device))


def _kept(model: Any, prompt: Prompt) -> tuple[float, float, int]:
    cache = DynamicCache(config=model.config.get_text_config())
    first_ms = _ask(model, **prompt.whole, past_key_values=cache)
    length = prompt.image["input_ids"].shape[1]
    cache.crop(-prompt.question.shape[1])
    kept_bytes = cache_bytes(cache)
    follow = torch.arange(prompt.question.shape[1], device=prompt.question.device) + length
    deltas = getattr(getattr(model, model.base_model_prefix), "rope_deltas", None)
    second_ms = _ask(
        model,
        input_ids=prompt.question,
        attention_mask=prompt.whole["attention_mask"],
        position_ids=follow.expand(len(prompt.question), -1)
        if deltas is None
        else (follow + deltas).expand(3, -1, -1),
        past_key_values=cache,
    )
    return first_ms, second_ms, kept_bytes


def _compressed(model: Any, prompt: Prompt) -> tuple[float, float, int]:
    device = prompt.question.device
    start = mark(device)
    held = compress(model, prompt.image)
    model(**held.inputs(model, prompt.question), use_cache=True, logits_to_keep=1)
    first_ms = between_ms(start, mark(device))
    start = mark(device)
    model(**held.inputs(model, prompt.question), use_cache=True, logits_to_keep=1)
    return first_ms, between_ms(start, mark(device)), held.nbytes


def questions_case(found: dict[str, Questions], about: dict[str, Any]) -> dict[str, Any]:
    """What was measured, ``about`` which input, as plain data."""
    plain = found[AGAIN].second.median_ms
    ways = {
        name: {
            "first_ms": one.first.spread(),
            "second_ms": one.second.spread(),
            "second_of_first": one.second.median_ms / one.first.median_ms,
            "second_of_plain": one.second.median_ms / plain,
            "kept_bytes": one.kept_bytes,
        }
        for name, one in found.items()
    }
    return {**about, "question_ways": ways}


def questions_table(case: dict[str, Any]) -> str:
    """One case for people, a row for each way."""
    lines = [
        heading(case),
        "",
        "| way | first question ms | second ms | of its first | of plain | kept MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, one in case["question_ways"].items():
        cells = [
            name,
            milliseconds(one["first_ms"]),
            milliseconds(one["second_ms"]),
            f"{one['second_of_first']:.3f}",
            f"{one['second_of_plain']:.3f}",
            f"{one['kept_bytes'] / 1e6:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
