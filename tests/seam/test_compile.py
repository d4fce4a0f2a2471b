"""A compiled decode step on a StaticCache: one full graph, the same answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import CompileConfig

from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.inputs import batch
from tests.helpers.run import generate, patched


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [prompts.SINGLE, prompts.RAGGED], ids=["single", "ragged"])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_compiled_decoding_is_one_graph(
    kind: str, case: tuple[prompts.Prompt, ...], attention: str
) -> None:
    """``generate`` compiles the step in full-graph mode, which any data-dependent branch breaks."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = patched(kind, attention)
    inputs = batch(model, case)
    expected = generate(model, inputs, 8)
    torch._dynamo.reset()
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    compiling._compile_all_devices = True  # upstream compiles on accelerators only, unasked
    actual = generate(model, inputs, 8, cache_implementation="static", compile_config=compiling)
    assert torch.equal(actual, expected)
    assert len(graphs) == 1, "steps compile anew"
