"""Times other packages that drop visual tokens beside this one: one process, one set of weights.

    make peers ANGELSLIM=FOLDER
    python results/peers.py --angelslim FOLDER --preset llava-1.5-7b --scale 0.125 --json peers.json

`make peers-env` makes the environment. AngelSlim's token compressor is in no package of the index,
so FOLDER is a checkout of its repository; without one it is left out. Models have random weights at
the shapes of the preset. Everyone gets the same prompt and keeps the same share of the visual
tokens, in turns, and generates through `generate`: a clock in its stopping criteria notes when each
token is there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import Qwen2_5_VLConfig, StoppingCriteria, StoppingCriteriaList

from atp_patch.bench.clock import Times, peak_bytes, reset_peak
from atp_patch.bench.comparison_tables import markdown
from atp_patch.bench.measure import cache_bytes, patched
from atp_patch.bench.presets import PRESETS, Depth, LlavaPreset, Preset, QwenPreset
from atp_patch.tools.arguments import comma_separated
from atp_patch.tools.command_line import machine
from atp_patch.tools.loading import choose_dtype

CPU = torch.device("cpu")


class Qwen25Preset(QwenPreset):
    """Qwen2.5-VL, whose tower attends within windows."""

    def config(self, depth: Depth) -> Any:
        """The family's configuration in this shape."""
        like = super().config(depth).to_dict()
        text = {k: v for k, v in like["text_config"].items() if k != "model_type"}
        vision = {
            "depth": depth.tower,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": self.hidden_size,
            "fullatt_block_indexes": [depth.tower - 1],
        }
        ids = {name: value for name, value in like.items() if name.endswith("_token_id")}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


MODELS: dict[str, Preset] = {
    "llava-1.5-7b": PRESETS["llava-1.5-7b"],
    "qwen2.5-vl-7b": Qwen25Preset(3584, 18944, 28, 28, 4, 152064, (896, 672), 32),
    # These small shapes are for trying the command out.
    "tiny-llava": PRESETS["tiny"],
    "tiny-qwen": Qwen25Preset(256, 688, 4, 2, 1, 1000, (280, 280), 2),
}


@dataclass(frozen=True)
class Way:
    """One way to answer.

    Attributes:
        name: what the table calls it.
        applied: makes a context inside which the model answers this way.
        answer: generates so many tokens; the model's own ``generate`` where it is None.
    """

    name: str
    applied: Callable[[], AbstractContextManager[Any]] = nullcontext
    answer: Callable[[int], Any] | None = None


@dataclass
class Found:
    """What was measured of one way.

    Attributes:
        first: times to the first token, tower included.
        decode: times of the tokens after it.
        kv_bytes: size of the keys and values at the end, where the way tells.
        peak_bytes: the most memory of the process, weights included.
        error: why nothing was measured.
    """

    first: Times = field(default_factory=Times)
    decode: Times = field(default_factory=Times)
    kv_bytes: int | None = None
    peak_bytes: int = 0
    error: str | None = None


class Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Note the time."""
        self.seconds.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print or write what was found."""
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parse.add_argument("--preset", default="llava-1.5-7b", choices=MODELS)
    parse.add_argument("--scale", type=float, default=0.125, help="share of the layers")
    parse.add_argument("--angelslim", type=Path, help="a checkout of AngelSlim's repository")
    parse.add_argument(
        "--methods", type=comma_separated(str), default=["fastv", "visionzip", "divprune"]
    )
    parse.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens")
    parse.add_argument("--dtype", default="bfloat16")
    parse.add_argument("--prompt-tokens", type=int, default=64)
    parse.add_argument("--decode-tokens", type=int, default=8)
    parse.add_argument("--runs", type=int, default=5)
    parse.add_argument("--json", type=Path)
    asked = parse.parse_args(argv)
    torch.manual_seed(0)
    preset = MODELS[asked.preset]
    dtype = choose_dtype(asked.dtype, CPU)
    model: Any = preset.build(asked.scale, "sdpa", "cpu", dtype)
    given = preset.inputs(preset.image, 1, asked.prompt_tokens, 0)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
    visual = preset.visual_tokens(preset.image)
    ways = list(all_ways(asked, model, inputs, visual, isinstance(preset, LlavaPreset)))
    found = compare(model, inputs, ways, asked)
    report = {
        "machine": machine(CPU),
        "load_before": os.getloadavg()[0],
        "preset": asked.preset,
        "scale": asked.scale,
        "layers": model.config.get_text_config().num_hidden_layers,
        "dtype": asked.dtype,
        "visual_tokens": visual,
        "text_tokens": asked.prompt_tokens,
        "keep": asked.keep,
        "runs": asked.runs,
        "versions": versions(),
        "ways": {
            name: {
                "first_ms": one.first.spread(),
                "decode_ms": one.decode.spread(),
                "kv_bytes": one.kv_bytes,
                "peak_bytes": one.peak_bytes,
                "error": one.error,
            }
            for name, one in found.items()
        },
    }
    if asked.json is not None:
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(found))


def versions() -> dict[str, str]:
    """Versions of the packages that take part."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("sparsevlm", "atp-patch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def all_ways(
    asked: argparse.Namespace, model: Any, inputs: dict[str, Any], visual: int, llava: bool
) -> Iterator[Way]:
    """The plain model, each method here and elsewhere, and the package `sparsevlm`."""
    yield Way("plain")
    for method in asked.methods:
        settings: dict[str, Any] = {"method": method, "keep": asked.keep}
        if method in ("fastv", "sparsevlm"):
            settings["layers"] = [1]
        yield Way(f"atp_patch {method}", patched(model, method, settings).applied)
        if asked.angelslim is not None and method != "sparsevlm":
            yield Way(f"AngelSlim {method}", angelslim(asked, model, method, llava))
    if not llava:
        try:
            from sparsevlm import sparsevlm_generate
        except ImportError:
            return
        kept = round(visual * asked.keep)

        def answer(tokens: int) -> Any:
            return sparsevlm_generate(
                model,
                None,
                inputs,
                visual,
                kept,
                max_new_tokens=tokens,
                target_layer=1,
                device="cpu",
            )

        yield Way("sparsevlm", lambda: eager(model), answer)


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Run the model with eager attention inside this context, which `sparsevlm` asks for."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def angelslim(
    asked: argparse.Namespace, model: Any, method: str, llava: bool
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which AngelSlim's token compressor prunes by its own configuration."""
    root = asked.angelslim / "angelslim"
    # Its packages above import data sets and quantisers, which the token compressor does not need.
    for name, path in (("angelslim", root), ("angelslim.compressor", root / "compressor")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules.setdefault(name, module)
    base = "angelslim.compressor.token_compressor"
    adapter = importlib.import_module(f"{base}.adapter").UniversalPruningAdapter
    config = importlib.import_module(f"{base}.base.config").TokenCompressorConfig
    family = "llava" if llava else "qwen2_5_vl"
    file = asked.angelslim / "configs" / family / "pruning" / f"{method}_r0.75.yaml"
    mapping = yaml.safe_load(file.read_text(encoding="utf-8"))["model_mapping"]

    @contextmanager
    def applied() -> Iterator[None]:
        settings = config.from_yaml(str(file))
        for stage in settings.strategies.values():
            stage.params["ratio"] = 1 - asked.keep
        made = adapter(model=model, strategy_config=settings, raw_map_data=mapping)
        made.wrap_model()
        try:
            yield
        finally:
            made.unwrap_model()

    return applied


def compare(
    model: Any, inputs: dict[str, Any], ways: Sequence[Way], asked: argparse.Namespace
) -> dict[str, Found]:
    """Let everyone answer in turn; one round of warm-up comes first."""
    found = {way.name: Found() for way in ways}
    generate, last = model.generate, {}

    with torch.inference_mode():
        for number in range(asked.runs + 1):
            # A fixed order would let each way always follow the same one.
            for way in random.Random(number).sample(list(ways), len(ways)):
                one, clock = found[way.name], Clock()
                if one.error is not None:
                    continue

                def clocked(*args: Any, clock: Clock = clock, **kwargs: Any) -> Any:
                    kwargs |= {
                        "stopping_criteria": StoppingCriteriaList([clock]),
                        "return_dict_in_generate": True,
                        "do_sample": False,
                        "pad_token_id": 0,
                        "min_new_tokens": 1 + asked.decode_tokens,
                    }
                    last["made"] = generate(*args, **kwargs)
                    return last["made"]

                model.generate = clocked
                gc.collect()
                reset_peak(CPU)
                try:
                    # AngelSlim prints the shapes of each prefill.
                    with contextlib.redirect_stdout(io.StringIO()), way.applied():
                        start = time.perf_counter()
                        if way.answer is None:
                            model.generate(**inputs, max_new_tokens=1 + asked.decode_tokens)
                        else:
                            way.answer(1 + asked.decode_tokens)
                except Exception as error:
                    one.error = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                    continue
                finally:
                    del model.generate
                one.peak_bytes = max(one.peak_bytes, peak_bytes(CPU) or 0)
                cache = last.pop("made").past_key_values
                one.kv_bytes = None if cache is None else cache_bytes(cache)
                del cache
                if number:
                    one.first.values_ms.append(1000 * (clock.seconds[0] - start))
                    steps = zip(clock.seconds, clock.seconds[1:], strict=False)
                    one.decode.values_ms += [1000 * (after - before) for before, after in steps]
    return found


def table(found: dict[str, Found]) -> str:
    """The table in Markdown."""
    rows = []
    for name, one in found.items():
        if one.error is not None:
            rows.append([name, one.error, "-", "-", "-"])
            continue
        kv = "-" if one.kv_bytes is None else f"{one.kv_bytes / 1e6:.1f}"
        cells = [shown(one.first), shown(one.decode), kv, f"{one.peak_bytes / 1e9:.2f}"]
        rows.append([name, *cells])
    head = [
        "way",
        "first token, ms",
        "a decoded token, ms",
        "keys and values, MB",
        "peak memory, GB",
    ]
    return markdown(head, rows)


def shown(times: Times) -> str:
    """The median, with quartiles in brackets."""
    low, high = times.quartiles_ms
    return f"{statistics.median(times.values_ms):.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
