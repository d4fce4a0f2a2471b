"""Serves the same requests with a plain and with pruned models, and says how many a second.

    python results/arrival.py --preset llava-1.5-7b --scale 0.0625 --dtype bfloat16 --json load.json

Each request has a picture and a question of its own length. First all requests wait, and are served
in batches of each size. Then they arrive one by one, at random times of a fixed seed, and whoever
waits is served in the next batch, up to a limit. Ways take turns. Batches are padded on the left.
The models have random weights, and every answer has the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from atp_patch.bench.clock import Times, peak_bytes, reset_peak
from atp_patch.bench.measure import PLAIN, Contender, in_turn, patched
from atp_patch.bench.presets import PRESETS
from atp_patch.tools.arguments import comma_separated
from atp_patch.tools.command_line import machine
from atp_patch.tools.loading import choose_dtype

CPU = torch.device("cpu")
SHORTEST, LONGEST = 16, 128  # text tokens of a request
Request = dict[str, torch.Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Serve, and print or write what was found."""
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parse.add_argument("--preset", default="llava-1.5-7b", choices=("llava-1.5-7b", "tiny"))
    parse.add_argument("--scale", type=float, default=0.0625, help="share of the layers")
    parse.add_argument("--dtype", default="bfloat16")
    parse.add_argument("--methods", type=comma_separated(str), default=["atp", "divprune"])
    parse.add_argument("--keep", type=float, default=0.25)
    parse.add_argument("--requests", type=int, default=32)
    parse.add_argument("--batch-size", type=comma_separated(int), default=[1, 8, 32])
    parse.add_argument("--tokens", type=int, default=4, help="of an answer")
    parse.add_argument("--runs", type=int, default=2)
    parse.add_argument("--limit", type=int, default=8, help="requests in a batch of the queue")
    parse.add_argument("--rate", type=float, help="requests a second; default: what plain serves")
    parse.add_argument("--json", type=Path)
    asked = parse.parse_args(argv)
    torch.manual_seed(0)
    dtype = choose_dtype(asked.dtype, CPU)
    preset = PRESETS[asked.preset]
    model: Any = preset.build(asked.scale, "sdpa", "cpu", dtype)
    requests = made(preset, asked.requests, dtype)
    settings = {name: {"method": name, "keep": asked.keep} for name in asked.methods}
    ways = [
        Contender(PLAIN, prunes=False),
        *(patched(model, name, given) for name, given in settings.items()),
    ]
    found: dict[str, Any] = {
        "machine": machine(CPU),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "settings": {name: str(value) for name, value in vars(asked).items()},
        "layers": model.config.get_text_config().num_hidden_layers,
        "batches": {},
    }
    with torch.inference_mode():
        served(model, requests[:2], asked.tokens)  # warm-up
        for size in asked.batch_size:
            rates: dict[str, Times] = {way.name: Times() for way in ways}
            peaks = dict.fromkeys(rates, 0)
            for number in range(asked.runs):
                for way in in_turn(ways, number):
                    reset_peak(CPU)
                    start = time.perf_counter()
                    with way.applied():
                        for first in range(0, len(requests), size):
                            served(model, requests[first : first + size], asked.tokens)
                    rates[way.name].values_ms.append(time.perf_counter() - start)
                    peaks[way.name] = max(peaks[way.name], peak_bytes(CPU) or 0)
            found["batches"][size] = {
                name: {
                    "requests_a_second": len(requests) / one.median_ms,
                    "seconds": one.values_ms,
                    "peak_bytes": peaks[name],
                }
                for name, one in rates.items()
            }
            write(found, asked.json)
        rate = asked.rate or max(
            case[PLAIN]["requests_a_second"] for case in found["batches"].values()
        )
        draw = random.Random(0)
        arrivals, at = [], 0.0
        for _ in requests:
            at += draw.expovariate(rate)
            arrivals.append(at)
        found["queue"] = {"rate": rate, "limit": asked.limit, "ways": {}}
        for way in ways:
            with way.applied():
                waits, seconds = queued(model, requests, arrivals, asked.limit, asked.tokens)
            waited = Times(waits)
            low, high = waited.quartiles_ms
            found["queue"]["ways"][way.name] = {
                "requests_a_second": len(requests) / seconds,
                "seconds_to_answer": {"median": waited.median_ms, "q1": low, "q3": high},
                "longest": max(waits),
            }
            write(found, asked.json)
    if asked.json is None:
        print(json.dumps(found, indent=1))


def write(found: dict[str, Any], file: Path | None) -> None:
    """Write what was found so far."""
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def made(preset: Any, number: int, dtype: torch.dtype) -> list[Request]:
    """The requests, each with a picture and a question of its own length."""
    draw = random.Random(0)
    found = []
    for seed in range(number):
        given = preset.inputs(preset.image, 1, draw.randint(SHORTEST, LONGEST), seed)
        found.append({n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()})
    return found


def served(model: Any, requests: Sequence[Request], tokens: int) -> torch.Tensor:
    """Answer some requests in one batch, padded on the left."""
    longest = max(one["input_ids"].shape[1] for one in requests)

    def padded(name: str) -> torch.Tensor:
        rows = [one[name] for one in requests]
        return torch.cat(
            [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=0) for row in rows]
        )

    return model.generate(  # type: ignore[no-any-return]
        input_ids=padded("input_ids"),
        attention_mask=padded("attention_mask"),
        pixel_values=torch.cat([one["pixel_values"] for one in requests]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def queued(
    model: Any, requests: Sequence[Request], arrivals: Sequence[float], limit: int, tokens: int
) -> tuple[list[float], float]:
    """Serve requests as they arrive; whoever waits is in the next batch, up to a limit.

    Returns:
        for each request the seconds from its arrival to its answer, and the seconds in all.
    """
    waits: list[float] = []
    start = time.perf_counter()
    while len(waits) < len(requests):
        now, first = time.perf_counter() - start, len(waits)
        if arrivals[first] > now:
            time.sleep(arrivals[first] - now)
            now = time.perf_counter() - start
        there = sum(at <= now for at in arrivals[first : first + limit])
        batch = slice(first, first + max(there, 1))
        served(model, requests[batch], tokens)
        done = time.perf_counter() - start
        waits += [done - at for at in arrivals[batch]]
    return waits, time.perf_counter() - start


if __name__ == "__main__":
    main()
