"""A compiled decode step on a StaticCache: one full graph, the same answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, StaticCache

import atp_patch
from atp_patch.bench.presets import PRESETS
from atp_patch.seam import CACHE_ARGUMENT
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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atp", "divprune"])
def test_pictures_of_other_sizes_compile_nothing(method: str) -> None:
    """The graph of a step serves prompts of every length, and any number of kept tokens."""
    frames: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        frames.append(graph)
        return graph.forward

    small = {"hidden_size": 256, "mlp_size": 64, "num_layers": 3, "vocab_size": 1000}
    heads = {"num_heads": 2, "num_kv_heads": 1, "tower_layers": 2}
    preset = replace(PRESETS["qwen2-vl-7b"], **small, **heads)
    torch.manual_seed(0)
    model: Any = preset.build(1.0, "sdpa", "cpu", torch.float32)
    layers = [2] if method == "atp" else None
    atp_patch.patch_model(model, layers, method, keep=0.5)
    torch._dynamo.reset()
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    compiling._compile_all_devices = True
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for size in ((168, 168), (224, 224), (280, 196)):
        inputs = preset.inputs(size, 1, 20, 0)
        expected = model.generate(**inputs, **asked)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
        with torch._dynamo.config.patch(error_on_recompile=len(frames) > 0):
            actual = model.generate(
                **inputs, **asked, **{CACHE_ARGUMENT: cache}, compile_config=compiling
            )
        assert torch.equal(actual, expected)
    assert len(frames) == 1
