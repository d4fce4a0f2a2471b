"""Times the plain model beside one whose patch keeps every token: what the hooks themselves cost.

    python results/overhead.py --preset llava-1.5-7b --dtype bfloat16 --json hooks.json
    python results/overhead.py --builtin builtin

The differences are taken in the same round and divided by the number of decoder layers. The second
form takes a built-in model with a question about one of the example scenes, and also says where
the time to the first token goes: to the processor, to the tower and to the decoder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from atp_patch.bench.clock import Times
from atp_patch.bench.measure import PLAIN, Contender, compare, patched
from atp_patch.bench.presets import PRESETS
from atp_patch.builtin import NAMES, load_builtin
from atp_patch.tools.command_line import machine
from atp_patch.tools.loading import choose_dtype

SCENE = Path(__file__).parents[1] / "examples" / "scenes" / "01.png"
QUESTION = "How many red shapes are there?"
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print or write what was found."""
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parse.add_argument("--preset", choices=sorted(PRESETS))
    parse.add_argument("--scale", type=float, default=0.125, help="share of the layers")
    parse.add_argument("--builtin", choices=NAMES)
    parse.add_argument("--dtype", default="float32")
    parse.add_argument("--runs", type=int, default=9)
    parse.add_argument("--decode-tokens", type=int, default=16)
    parse.add_argument("--json", type=Path)
    asked = parse.parse_args(argv)
    if bool(asked.preset) == bool(asked.builtin):
        parse.error("give one of --preset and --builtin.")
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "machine": machine(CPU),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "model": asked.preset or asked.builtin,
        "runs": asked.runs,
    }
    if asked.builtin:
        model, inputs, processor = built_in(asked.builtin, asked.runs)
        found["processor_ms"] = processor.spread()
    else:
        preset = PRESETS[asked.preset]
        dtype = choose_dtype(asked.dtype, CPU)
        model = preset.build(asked.scale, "sdpa", "cpu", dtype)
        given = preset.inputs(preset.image, 1, 64, 0)
        inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
    layers = model.config.get_text_config().num_hidden_layers
    ways = {
        "hooks alone": {"method": "random", "keep": 1.0},
        "hooks and scores": {"method": "atp", "keep": 1.0},
    }
    contenders = [
        Contender(PLAIN, prunes=False),
        *(patched(model, name, settings) for name, settings in ways.items()),
    ]
    if asked.builtin:
        contenders.append(patched(model, "a quarter kept", {"method": "atp"}))
    timed = compare(
        model,
        contenders,
        inputs,
        runs=asked.runs,
        decode_tokens=asked.decode_tokens,
        with_overhead=False,
    )
    plain = timed[PLAIN]
    found["decoder_layers"] = layers
    found["tokens"] = int(inputs["input_ids"].shape[1])
    found["ways"] = {
        name: {
            "prefill_ms": one.prefill.spread(),
            "vision_ms": one.vision.spread(),
            "decoder_ms": one.decoder.spread(),
            "decode_ms": one.decode.spread(),
            "more": {
                "decoder": more(plain.decoder, one.decoder, layers),
                "decode": more(plain.decode, one.decode, layers),
            },
        }
        for name, one in timed.items()
    }
    text = json.dumps(found, indent=1) + "\n"
    if asked.json is None:
        print(text, end="")
    else:
        asked.json.write_text(text, encoding="utf-8")


def built_in(name: str, runs: int) -> tuple[Any, dict[str, torch.Tensor], Times]:
    """A built-in model, a question about a scene, and times of the processor."""
    model, processor = load_builtin(NAMES[name])
    image = Image.open(SCENE).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    times = Times()
    for number in range(runs + 1):
        start = time.perf_counter()
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=image, text=text, return_tensors="pt")
        if number:
            times.values_ms.append(1000 * (time.perf_counter() - start))
    return model, dict(inputs), times


def more(plain: Times, other: Times, layers: int) -> dict[str, float]:
    """What a way takes more than the plain one in the same round.

    Returns:
        the median in microseconds a decoder layer with its quartiles, and the median's share of
        the plain time.
    """
    pairs = list(zip(plain.values_ms, other.values_ms, strict=True))
    each = Times([1000 * (after - before) / layers for before, after in pairs])
    low, high = each.quartiles_ms
    share = statistics.median(after / before - 1 for before, after in pairs)
    return {"us_a_layer": each.median_ms, "q1": low, "q3": high, "share": share}


if __name__ == "__main__":
    main()
