"""Times of a first and a second question about one image, whose cache the second one may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from atp_patch.bench.clock import Times, between_ms, mark
from atp_patch.bench.comparison_tables import listing, milliseconds
from atp_patch.bench.measure import (
    Contender,
    Inputs,
    cache_bytes,
    in_turn,
    last_positions,
    patched,
)
from atp_patch.seam import CACHE_ARGUMENT
from atp_patch.tools.visual_cache import compress

AGAIN, KEPT = "plain, image read again", "plain, KV cache of the image kept"


@dataclass
class Questions:
    """What was measured of two questions, one after the other.

    Attributes:
        first: times to the first token of the first question's answer.
        second: times to the first token of the second question's answer.
        kept_bytes: size of what is kept of the image between them.
    """

    first: Times = field(default_factory=Times)
    second: Times = field(default_factory=Times)
    kept_bytes: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt that is cut behind its image.

    Attributes:
        whole: inputs of the whole prompt.
        image: inputs of the part up to the image's last visual token.
        question: (B, T) ids of the rest.
    """

    whole: Inputs
    image: Inputs
    question: Tensor

    @classmethod
    def cut(cls, inputs: Inputs, text: Tensor) -> Prompt:
        """Cut a prompt after its last visual token, which stands at the same place in all samples.

        Args:
            inputs: the inputs of the prompt.
            text: (B, L) bool, which is false at visual tokens.
        """
        ids = inputs["input_ids"]
        length = int((~text[0]).nonzero().max()) + 1
        image = {n: t[:, :length] if t.shape == ids.shape else t for n, t in inputs.items()}
        return cls(inputs, image, ids[:, length:])


def compare_questions(
    model: Any,
    inputs: Inputs,
    text: Tensor,
    voco_tokens: Sequence[int],
    *,
    runs: int,
    advance: Callable[[int], object] = lambda pairs: None,
) -> dict[str, Questions]:
    """Time all ways to answer two questions, in turn: the plain model that reads the image again,
    the plain model that keeps the image's cache, and VoCo.

    The second question has the text of the first, because only its length matters.

    Args:
        model: the plain model.
        inputs: the inputs of the prompt, on the model's device.
        text: (B, L) bool, which is false at visual tokens.
        voco_tokens: numbers of VoCo tokens, each of which is a way of its own.
        runs: timed rounds, which follow one round of warm-up.
        advance: is called with the number of pairs of questions that were asked since the call
            before.
    """
    prompt = Prompt.cut(inputs, text)
    ways: list[tuple[Contender, Callable[[Any, Prompt], tuple[float, float, int]]]] = [
        (Contender(AGAIN, prunes=False), _again),
        (Contender(KEPT, prunes=False), _kept),
    ]
    for tokens in voco_tokens:
        name = f"voco, {tokens} token{'s' * (tokens > 1)}"
        ways.append((patched(model, name, {"method": "voco", "num_tokens": tokens}), _with_voco))
    found = {way.name: Questions() for way, _ in ways}
    with torch.inference_mode():
        for round_number in range(runs + 1):
            for way, ask in in_turn(ways, round_number):
                with way.applied():
                    first_ms, second_ms, found[way.name].kept_bytes = ask(model, prompt)
                if round_number:
                    found[way.name].first.values_ms.append(first_ms)
                    found[way.name].second.values_ms.append(second_ms)
                advance(1)
    return found


def _ask(model: Any, **inputs: Any) -> float:
    """Milliseconds of a forward pass up to the logits of the next token."""
    start = mark(inputs["input_ids"].device)
    model(**{"use_cache": True, "logits_to_keep": 1, **inputs})
    return between_ms(start, mark(inputs["input_ids"].device))


def _again(model: Any, prompt: Prompt) -> tuple[float, float, int]:
    return _ask(model, **prompt.whole), _ask(model, **prompt.whole), 0


def _kept(model: Any, prompt: Prompt) -> tuple[float, float, int]:
    cache = DynamicCache(config=model.config.get_text_config())
    first_ms = _ask(model, **prompt.whole, **{CACHE_ARGUMENT: cache})
    tokens, mask = prompt.question.shape[1], prompt.whole["attention_mask"]
    cache.crop(-tokens)
    kept_bytes = cache_bytes(cache)
    second_ms = _ask(
        model,
        input_ids=prompt.question,
        attention_mask=mask,
        **last_positions(model, mask, tokens),
        **{CACHE_ARGUMENT: cache},
    )
    return first_ms, second_ms, kept_bytes


def _with_voco(model: Any, prompt: Prompt) -> tuple[float, float, int]:
    device = prompt.question.device
    start = mark(device)
    held = compress(model, prompt.image)
    model(**held.inputs(model, prompt.question), use_cache=True, logits_to_keep=1)
    first_ms = between_ms(start, mark(device))
    start = mark(device)
    model(**held.inputs(model, prompt.question), use_cache=True, logits_to_keep=1)
    return first_ms, between_ms(start, mark(device)), held.nbytes


def questions_case(found: dict[str, Questions], about: dict[str, Any]) -> dict[str, Any]:
    """What was measured as plain data; ``about`` says on which input."""
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
    """The table of one case, with a row for each way."""
    head = ["way", "first question ms", "second ms", "of its first", "of plain", "kept MB"]
    rows = [
        [
            name,
            milliseconds(one["first_ms"]),
            milliseconds(one["second_ms"]),
            f"{one['second_of_first']:.3f}",
            f"{one['second_of_plain']:.3f}",
            f"{one['kept_bytes'] / 1e6:.2f}",
        ]
        for name, one in case["question_ways"].items()
    ]
    return listing(case, head, rows)
