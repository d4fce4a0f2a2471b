"""Milliseconds that each method takes to choose, on one core of a CPU.

    python results/choosing.py --methods atp@1+4+10,divprune --budgets 0.25,0.15
    python results/choosing.py --greedy

The first form patches a built-in model with each method at each budget, and adds up what the patch
itself does in one prefill of one picture: reading the tower's attention, scoring, choosing, merging
and gathering. The second form takes the greedy selections alone, 1,024 of 4,096 tokens with the
feature size of LLaVA-1.5-7B, beside the prefill of a decoder of that size: 16 times two layers in
bfloat16. All times are CPU times of this thread, medians over rounds in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import atp_patch
from atp_patch.bench.presets import PRESETS
from atp_patch.builtin import NAMES, load_builtin
from atp_patch.contract.errors import BudgetError
from atp_patch.maths import (
    cosine_similarities,
    coverage_selection,
    determinantal_selection,
    max_min_selection,
)
from atp_patch.methods import untrained_methods
from atp_patch.patching.api import is_patched, require_patch
from atp_patch.seam import MergeHooks, ReadingHooks
from atp_patch.tools.arguments import comma_separated
from atp_patch.tools.method_spec import read_method_spec

SCENE = Path(__file__).parents[1] / "examples" / "scenes" / "01.png"
QUESTION = "How many red shapes are there?"
TOKENS, KEPT, BUILT_LAYERS = 4096, 1024, 2


def main() -> None:
    """Measure, and print or write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", choices=NAMES, help="(default: builtin)")
    parser.add_argument("--budgets", type=comma_separated(float), default=[0.5, 0.25, 0.15, 0.06])
    parser.add_argument(
        "--methods",
        type=comma_separated(str),
        default=untrained_methods(),
        help="names, with layers and budgets of their own as the evaluation takes them",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = greedy(given.rounds) if given.greedy else every_method(given)
    text = json.dumps(found, indent=1) + "\n"
    if given.json is None:
        print(text, end="")
    else:
        given.json.write_text(text, encoding="utf-8")


def every_method(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The median milliseconds of each method at each budget that it can meet."""
    model, processor = load_builtin(NAMES[given.model])
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.open(SCENE).convert("RGB"), text=text, return_tensors="pt")
    whole = int((inputs["input_ids"] == model.config.image_token_id).sum())
    specs = [read_method_spec(method) for method in given.methods]
    times: dict[tuple[str, float], list[float]] = {}
    for number in range(given.rounds + 1):
        for spec in specs:
            name = spec.name
            for budget in spec.budgets or given.budgets:
                try:
                    atp_patch.patch_model(
                        model,
                        None if spec.layers is None else list(spec.layers),
                        spec.stages,
                        target_tokens=budget * whole,
                    )
                    require_patch(model).check_budget(whole)
                    with clocked(model) as spent_ms:
                        model(**inputs, use_cache=True, logits_to_keep=1)
                except BudgetError:
                    continue
                finally:
                    if is_patched(model):
                        atp_patch.unpatch_model(model)
                if number:  # the first round warms up
                    times.setdefault((name, budget), []).append(spent_ms())
    found: dict[str, dict[str, float]] = {}
    for (name, budget), values in times.items():
        found.setdefault(name, {})[f"{budget:g}"] = round(statistics.median(values), 2)
    return found


@contextmanager
def clocked(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Time what the model's patch does inside this context.

    Yields:
        a function that gives the milliseconds so far.
    """
    seam = require_patch(model).seam
    spans: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spans.append(time.thread_time() - start)

        return call

    owners: list[tuple[Any, str]] = [
        (seam.decoder, name) for name in ("pass_of", "before_layer", "finish")
    ]
    if isinstance(seam.vision, MergeHooks):
        owners += [(seam.vision, name) for name in ("_groups", "_merge_rows")]
    for owner, name in owners:
        vars(owner)[name] = timed(getattr(owner, name))
    if isinstance(seam.vision, ReadingHooks):  # its hook is registered, and goes with the patch
        hooks = seam.vision.base.get_submodule(seam.vision.tower.projector)._forward_hooks
        for key, hook in hooks.items():
            if getattr(hook, "__self__", None) is seam.vision:
                hooks[key] = timed(hook)
    try:
        yield lambda: 1000 * sum(spans)
    finally:
        for owner, name in owners:
            del vars(owner)[name]


def greedy(rounds: int) -> dict[str, Any]:
    """Seconds of the greedy selections and of a prefill, and each selection's share of it."""
    preset = PRESETS["llava-1.5-7b"]
    share = BUILT_LAYERS / preset.num_layers
    decoder: Any = preset.build(share, "sdpa", "cpu", torch.bfloat16).get_decoder()
    assert len(decoder.layers) == BUILT_LAYERS
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, TOKENS, preset.hidden_size, generator=generator)
    embeds = features.to(torch.bfloat16)
    valid, counts = torch.ones(1, TOKENS, dtype=torch.bool), torch.tensor([KEPT])
    weight = torch.rand(1, TOKENS, generator=generator)

    def alike(*, rounded: bool = True) -> torch.Tensor:
        return cosine_similarities(features, valid, rounded=rounded)

    work: dict[str, Callable[[], object]] = {
        "divprune": lambda: max_min_selection(alike(), valid, counts),
        "scope": lambda: coverage_selection(alike(), weight, valid, counts),
        "cdpruner": lambda: determinantal_selection(alike(rounded=False), weight, valid, counts),
        "layers": lambda: decoder(inputs_embeds=embeds, use_cache=False),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, task in work.items():
            start = time.thread_time()
            task()
            if number:
                times[name].append(time.thread_time() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    prefill = seconds.pop("layers") / share
    return {
        "prefill_s": prefill,
        "selection_s": seconds,
        "share": {name: value / prefill for name, value in seconds.items()},
        "all_s": times,
    }


if __name__ == "__main__":
    main()
