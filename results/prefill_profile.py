#!/usr/bin/env python3
"""Profile one pruned prefill: the patch's own kernels, and how often the host waits for a GPU.

    python results/prefill_profile.py llava-1.5-7b --method atp --device cuda --json profile.json

It runs on a CPU too, where nothing is waited for. What the patch does itself is told from the host
model's work by a range around each call of the patch's hooks. The model has random weights.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import atp_patch
from atp_patch.bench.presets import PRESETS
from atp_patch.patching.api import require_patch

HOOKS = ("pass_of", "before_layer", "finish")  # what the patch does in a pass through the decoder
RANGE = "atp_patch"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parse.add_argument("preset", choices=sorted(PRESETS))
    parse.add_argument("--method", default="atp")
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--scale", type=float, default=1.0, help="share of the layers")
    parse.add_argument("--keep", type=float, default=0.5)
    parse.add_argument("--json", type=Path)
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Build the model, profile it, and print or write what was found."""
    asked = parser().parse_args(argv)
    torch.manual_seed(0)
    preset = PRESETS[asked.preset]
    model = preset.build(asked.scale, "sdpa", asked.device, torch.bfloat16)
    atp_patch.patch_model(model, method=asked.method, keep=asked.keep)
    given = preset.inputs(preset.image, 1, 64, 0)
    inputs = {name: moved(value, asked.device) for name, value in given.items()}

    def prefill() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        for _ in range(3):
            prefill()
        found = {
            "preset": asked.preset,
            "scale": asked.scale,
            "method": asked.method,
            "device": torch.cuda.get_device_name() if asked.device.startswith("cuda") else "cpu",
            "waits": waits(prefill) if asked.device.startswith("cuda") else [],
            **kernels(model, prefill, asked.device),
        }
    text = json.dumps(found, indent=1) + "\n"
    if asked.json is None:
        print(text, end="")
    else:
        asked.json.write_text(text)


def moved(value: torch.Tensor, device: str) -> torch.Tensor:
    """A tensor on the device, floating point numbers in the model's dtype."""
    return value.to(device, torch.bfloat16 if value.is_floating_point() else None)


def waits(work: Callable[[], None]) -> list[str]:
    """The places at which the host waits for the GPU, one entry each time."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(one.filename).name}:{one.lineno}" for one in caught]


@contextmanager
def ranges(owner: Any) -> Iterator[None]:
    """Record a range around each call of the patch's hooks."""

    def ranged(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(RANGE):
                return function(*args, **kwargs)

        return call

    for name in HOOKS:
        vars(owner)[name] = ranged(getattr(owner, name))
    try:
        yield
    finally:
        for name in HOOKS:
            del vars(owner)[name]


def kernels(model: Any, work: Callable[[], None], device: str) -> dict[str, Any]:
    """The share of the patch in a prefill's time on the device, and its operations by their time.

    Times of operations are those of the device, in microseconds: kernels on a GPU, else the CPU.
    """
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ranges(require_patch(model).seam.decoder), profile(activities=activities) as made:
        work()
        if on_gpu:
            torch.cuda.synchronize()

    def spent_us(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = made.events() or []
    total = sum(map(spent_us, events))
    ours: dict[str, list[float]] = {}
    for event in (e for e in events if inside(e)):
        ours.setdefault(event.name, []).append(spent_us(event))
    by_time = sorted(ours.items(), key=lambda one: -sum(one[1]))
    mine = sum(map(sum, ours.values()))
    return {
        "total_us": total,
        "patch_us": mine,
        "patch_share": mine / total,
        "operations": sum(map(len, ours.values())),
        "longest": {name: {"calls": len(times), "us": sum(times)} for name, times in by_time[:25]},
    }


def inside(event: Any) -> bool:
    """Whether an operation was called within a range of the patch."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name == RANGE:
            return True
        parent = parent.cpu_parent
    return False


if __name__ == "__main__":
    main()
