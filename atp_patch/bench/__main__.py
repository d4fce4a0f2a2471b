"""``python -m atp_patch.bench``: pruned against plain at the shapes of known models, in turns, in
one process, with random weights.

    python -m atp_patch.bench --preset llava-1.5-7b --scale 0.25 --target-tokens 144
    python -m atp_patch.bench --methods atp,fastv@2 --schedule 126,88,20 --layers 4,14,24
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from atp_patch import __version__
from atp_patch.bench.lengths import time_same_lengths
from atp_patch.bench.measure import PLAIN, Contender, compare, patched
from atp_patch.bench.plot import check_plot, draw
from atp_patch.bench.presets import PRESETS, Preset, Size, describe
from atp_patch.bench.report import entries, same_lengths, table
from atp_patch.bench.training import as_data, compare_steps, steps_table
from atp_patch.command_line import OneLineParser, comma_separated, execute
from atp_patch.config import scaled_layers
from atp_patch.errors import ConfigError
from atp_patch.families import family_of
from atp_patch.methods import Compressor, Method, make_method


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m atp_patch.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="llava-1.5-7b")
    add("--scale", type=float, default=1.0, help="share of the layers that are built")
    add("--methods", default="atp", help='comma-separated, with layers as in "atp,fastv@2"')
    add(
        "--layers",
        type=comma_separated(int),
        help="pruning layers, e.g. 4,14,24; scaled by default",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="share kept at each pruning layer")
    budget.add_argument("--target-tokens", type=float, help="average visual tokens, e.g. 144")
    budget.add_argument(
        "--schedule",
        type=comma_separated(int),
        help="visual tokens left at each of --layers, e.g. 126,88,20",
    )
    add(
        "--image", type=comma_separated(size), help="width x height in pixels, e.g. 448x448,896x896"
    )
    add(
        "--batch-size",
        type=comma_separated(int),
        default=[1],
        help="one or more, e.g. 1,2,4,8,16,32",
    )
    add(
        "--prompt-tokens",
        type=comma_separated(int),
        default=[64],
        help="text tokens, one or more numbers",
    )
    add("--decode-tokens", type=int, default=8)
    add("--runs", type=int, default=9)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--attn", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    add("--seed", type=int, default=0)
    add(
        "--profile",
        action="store_true",
        help="also time the plain model at the lengths that pruning leaves: where time goes",
    )
    add(
        "--train",
        action="store_true",
        help="time training steps instead: plain, patched, and patched with the heads alone",
    )
    add("--gradient-checkpointing", action="store_true", help="with --train")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--plot", type=Path, metavar="FILE.png", help="draw speed-up against FLOPs ratio")
    return parser


def size(text: str) -> Size:
    """Width and height from "896x672"; argparse names this function in its errors."""
    width, height = text.split("x")
    return int(width), int(height)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, as :func:`execute` says."""
    memory = "give a smaller --scale, or smaller numbers for --batch-size."
    return execute(_parser(), _command, argv, memory=memory)


def _command(args: argparse.Namespace) -> None:
    report = run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(report["cases"], report["model"], args.plot)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build, measure each case and print its table; everything measured as plain data."""
    if args.plot is not None:
        check_plot()
    _check_training(args)
    for name in ("runs", "batch_size", "prompt_tokens"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    preset = PRESETS[args.preset]
    images = args.image or [preset.image]
    depth = preset.depth(args.scale)
    settings = {image: _settings(args, preset, image, depth.decoder) for image in images}
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device != "cpu" else "float32"))
    model: Any = preset.build(args.scale, args.attn, args.device, dtype)
    scaled = "" if args.scale == 1 else f", scaled to {args.scale:g} of its layers"
    report: dict[str, Any] = {
        "atp_patch": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": _machine(args.device),
        "model": f"{args.preset}{scaled}: {describe(model)}, {str(dtype).removeprefix('torch.')}",
        "cases": [],
    }
    sys.stdout.write(
        f"{report['model']}\n{report['machine']}; atp_patch {__version__}, torch "
        f"{report['torch']}, transformers {report['transformers']}\n"
    )
    for image, batch_size, prompt in product(images, args.batch_size, args.prompt_tokens):
        inputs = _to(preset.inputs(image, batch_size, prompt, args.seed), args.device, dtype)
        if args.train:
            report["cases"].append(_training_case(args, model, preset, image, inputs))
            continue
        contenders = [patched(model, name, given) for name, given in settings[image].items()]
        case = _case(args, model, contenders, inputs)
        case |= {"image": list(image), "visual_tokens": preset.visual_tokens(image)}
        report["cases"].append(case)
        sys.stdout.write("\n" + table(case))
        sys.stdout.flush()
    return report


def _check_training(args: argparse.Namespace) -> None:
    """Arguments that go with, or without, ``--train`` alone."""
    if args.gradient_checkpointing and not args.train:
        raise ConfigError("--gradient-checkpointing goes with --train.")
    others = {
        "--methods": args.methods != "atp",
        "--keep, --target-tokens and --schedule": any(
            x is not None for x in (args.keep, args.target_tokens, args.schedule)
        ),
        "--profile": args.profile,
        "--plot": args.plot is not None,
    }
    for name, given in others.items():
        if args.train and given:
            raise ConfigError(
                f"leave out {name} with --train: a model in training keeps its full length, "
                "whatever is pruned."
            )


def _training_case(
    args: argparse.Namespace, model: Any, preset: Preset, image: Size, inputs: dict[str, Any]
) -> dict[str, Any]:
    ids = inputs["input_ids"]
    config = model.config
    visual = family_of(config).placeholder_ids(config)
    text = ~torch.isin(ids, torch.tensor(visual, device=ids.device))
    num_layers = config.get_text_config().num_hidden_layers
    layers = args.layers or scaled_layers(num_layers)
    checkpointing = args.gradient_checkpointing
    found = compare_steps(
        model, layers, inputs, text, runs=args.runs, gradient_checkpointing=checkpointing
    )
    case = {
        "image": list(image),
        "visual_tokens": preset.visual_tokens(image),
        "batch_size": ids.shape[0],
        "prompt_tokens": int(text[0].sum()),
        "runs": args.runs,
        "gradient_checkpointing": checkpointing,
        "ways": as_data(found),
    }
    sys.stdout.write("\n" + steps_table(case))
    sys.stdout.flush()
    return case


def _case(
    args: argparse.Namespace, model: Any, contenders: Sequence[Contender], inputs: dict[str, Any]
) -> dict[str, Any]:
    batch_size = inputs["input_ids"].shape[0]
    everyone = [Contender(PLAIN, prunes=False), *contenders]
    found = compare(model, everyone, inputs, runs=args.runs, decode_tokens=args.decode_tokens)
    columns = entries(found, batch_size)
    for contender in contenders:
        trace = found[contender.name].trace
        if args.profile and trace is not None:
            columns[contender.name]["same_lengths"] = same_lengths(
                time_same_lengths(model, contender, inputs, trace, runs=args.runs)
            )
    text = next(one.trace.text_tokens[0] for one in found.values() if one.trace is not None)
    return {
        "batch_size": batch_size,
        "prompt_tokens": text,
        "runs": args.runs,
        "contenders": columns,
    }


def _settings(
    args: argparse.Namespace, preset: Preset, image: Size, num_layers: int
) -> dict[str, dict[str, Any]]:
    """Each method as it was named, with the arguments of ``patch_model``."""
    total = preset.visual_tokens(image)
    found: dict[str, dict[str, Any]] = {}
    for spec in args.methods.split(","):
        name, _, places = spec.partition("@")
        method = make_method(name, {})
        given: dict[str, Any] = {"method": name}
        if isinstance(method, Method):
            given["layers"] = args.layers or scaled_layers(num_layers)
            if places:
                given["layers"] = _layers(spec, places)
        if isinstance(method, Compressor):
            pass  # its number of tokens is its budget
        elif args.schedule is not None:
            given["keep"] = _shares(args.schedule, total, given.get("layers"))
        elif args.keep is not None or args.target_tokens is not None:
            given |= {"keep": args.keep, "target_tokens": args.target_tokens}
        found[spec] = given
    return found


def _layers(spec: str, places: str) -> list[int]:
    try:
        return [int(place) for place in places.split("+")]
    except ValueError as error:
        raise ConfigError(f"--methods {spec}: give layers after @, as in fastv@2+4.") from error


def _shares(schedule: Sequence[int], total: int, layers: Sequence[int] | None) -> list[float]:
    """Share of the survivors that leaves each count."""
    if layers is None or len(schedule) != len(layers):
        raise ConfigError(
            f"--schedule has {len(schedule)} counts; give as many --layers, and methods that prune "
            "inside the decoder."
        )
    before = [total, *schedule[:-1]]
    if any(not 0 < now <= then for then, now in zip(before, schedule, strict=True)):
        raise ConfigError(f"--schedule {schedule}: counts fall from {total} and stay above 0.")
    return [now / then for then, now in zip(before, schedule, strict=True)]


def _to(inputs: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in moved.items()}


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
