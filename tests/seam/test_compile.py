"""A compiled decode step on a StaticCache."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import batch
from tests.helpers.run import Session, kept_of, patched, words


@pytest.mark.slow
@pytest.mark.parametrize("case", [prompts.SINGLE, prompts.RAGGED], ids=["single", "ragged"])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_compiled_decoding_is_masked(kind: str, case: tuple[prompts.Prompt, ...]) -> None:
    """Prefill as usual, then compiled steps: right, and compiled once for all of them."""
    model = patched(kind)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=120)
    session = Session(model, batch(model, case), cache)
    kept = kept_of(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, backend=backend, dynamic=False)
    session.model = step
    answers = [session.feed(words(len(case), 1, seed)) for seed in range(2)]
    after_two = len(graphs)
    answers += [session.feed(words(len(case), 1, seed)) for seed in range(2, 5)]
    session.model = model
    expected = session.reference(tiny.tiny_model(kind), kept)[:, -5:]
    assert_close(torch.cat(answers, 1), expected)
    assert len(graphs) == after_two, "every step compiles anew"
