"""``python -m atp_patch.bench``: a pruned model against the plain one, alternating, in one
process.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from atp_patch import __version__
from atp_patch.bench.lengths import SameLengths, time_same_lengths
from atp_patch.bench.measure import Comparison, Times, compare
from atp_patch.bench.presets import PRESETS, describe
from atp_patch.config import scaled_layers
from atp_patch.errors import ATPError
from atp_patch.patch import patch_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m atp_patch.bench", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llava-1.5-7b")
    parser.add_argument(
        "--decoder-layers", type=int, help="build fewer decoder layers than the shape has"
    )
    parser.add_argument("--method", default="atp")
    parser.add_argument(
        "--layers", type=_ints, help="pruning layers, e.g. 4,14,24; scaled by default"
    )
    parser.add_argument("--keep", type=float, help="share kept at each pruning layer")
    parser.add_argument("--target-tokens", type=float, help="average visual tokens, e.g. 144")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attn", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also time the plain model at the lengths that pruning leaves: where time goes",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0, or 2 with one line on stderr where an argument is wrong."""
    args = _parser().parse_args(argv)
    try:
        report = run(args)
    except ATPError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build, patch, compare; everything measured as plain data."""
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device != "cpu" else "float32"))
    preset = PRESETS[args.preset]
    model: Any = preset.build(args.decoder_layers, args.attn).to(args.device, dtype)
    depth = model.config.get_text_config().num_hidden_layers
    layers = args.layers or scaled_layers(depth)
    patch_model(
        model, layers=layers, method=args.method, keep=args.keep, target_tokens=args.target_tokens
    )
    inputs = preset.inputs(args.batch_size, args.prompt_tokens, args.seed)
    inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    found = compare(model, inputs, runs=args.runs, decode_tokens=args.decode_tokens)
    report = _report(args, model, layers, dtype, found)
    if args.profile:
        report["same_lengths"] = _same_lengths(
            time_same_lengths(model, inputs, found.trace, runs=args.runs)
        )
    return report


def _report(
    args: argparse.Namespace,
    model: Any,
    layers: list[int],
    dtype: torch.dtype,
    found: Comparison,
) -> dict[str, Any]:
    counts = {layer: found.trace.layers[layer].kept_counts[0] for layer in layers}
    speedups = sorted(found.prefill_speedups)
    return {
        "atp_patch": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": _machine(args.device),
        "model": f"{args.preset}: {describe(model)}, {str(dtype).removeprefix('torch.')}",
        "method": args.method,
        "batch_size": args.batch_size,
        "prompt_tokens": args.prompt_tokens,
        "visual_tokens": found.trace.visual_tokens,
        "kept": counts,
        "average_tokens": found.trace.average_tokens,
        "runs": args.runs,
        "prefill_plain_ms": _spread(found.prefill_plain),
        "prefill_pruned_ms": _spread(found.prefill_pruned),
        "prefill_speedup": found.prefill_speedup,
        "prefill_speedup_range": [speedups[0], speedups[-1]],
        "decode_plain_ms": _spread(found.decode_plain),
        "decode_pruned_ms": _spread(found.decode_pruned),
        "overhead_ms": _spread(found.overhead),
        "overhead_share": found.overhead_share,
        "flops_plain": found.trace.flops_plain,
        "flops_pruned": found.trace.flops,
        "flops_ratio": found.flops_ratio,
        "efficiency": found.efficiency,
        "kv_bytes_plain": found.kv_bytes_plain,
        "kv_bytes_pruned": found.kv_bytes_pruned,
    }


def _same_lengths(found: SameLengths) -> dict[str, Any]:
    return {
        "layer_lengths": found.layer_lengths,
        "plain_ms": {length: _spread(times) for length, times in found.plain.items()},
        "pruned_ms": _spread(found.pruned),
        "least_ms": found.least_ms,
        "reached": found.reached,
    }


def _spread(times: Times) -> dict[str, float] | None:
    if not times.values_ms:
        return None
    low, high = times.quartiles_ms
    return {"median": times.median_ms, "q1": low, "q3": high}


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def table(report: dict[str, Any]) -> str:
    """The report for people."""

    def ms(key: str) -> str:
        entry = report[key]
        if entry is None:
            return "-"
        return f"{entry['median']:.1f} [{entry['q1']:.1f}, {entry['q3']:.1f}]"

    kept = ", ".join(f"{count} from layer {layer}" for layer, count in report["kept"].items())
    low, high = report["prefill_speedup_range"]
    rows = [
        ("prefill ms", ms("prefill_plain_ms"), ms("prefill_pruned_ms")),
        ("decode ms/token", ms("decode_plain_ms"), ms("decode_pruned_ms")),
        (
            "prefill TFLOPs",
            f"{report['flops_plain'] / 1e12:.3f}",
            f"{report['flops_pruned'] / 1e12:.3f}",
        ),
        (
            "KV cache MB",
            f"{report['kv_bytes_plain'] / 1e6:.1f}",
            f"{report['kv_bytes_pruned'] / 1e6:.1f}",
        ),
    ]
    lines = [
        report["model"],
        f"{report['machine']}; torch {report['torch']}, transformers {report['transformers']}",
        f"{report['method']}: {report['visual_tokens']:.0f} visual tokens, kept {kept}; "
        f"average {report['average_tokens']:.1f}; batch {report['batch_size']}, "
        f"{report['prompt_tokens']} text tokens; {report['runs']} alternating runs, "
        "median [quartiles]",
        "",
        f"{'':<16}{'plain':>26}{'pruned':>26}",
        *(f"{name:<16}{plain:>26}{pruned:>26}" for name, plain, pruned in rows),
        "",
        f"prefill speed-up {report['prefill_speedup']:.3f} (single pairs {low:.3f} to {high:.3f}), "
        f"FLOPs ratio {report['flops_ratio']:.3f}, efficiency {report['efficiency']:.3f}",
        f"scoring, choosing, gathering: {ms('overhead_ms')} ms, "
        f"{100 * report['overhead_share']:.2f} % of the pruned prefill",
    ]
    if "same_lengths" in report:
        lines += ["", *_profile_lines(report["same_lengths"])]
    return "\n".join(lines) + "\n"


def _profile_lines(found: dict[str, Any]) -> list[str]:
    each = found["layer_lengths"]
    longest = max(each)
    full = found["plain_ms"][longest]["median"] / longest
    lines = ["where the time goes: the plain model on as many tokens as pruning leaves"]
    for length, times in found["plain_ms"].items():
        lines.append(
            f"  {length:>5} tokens ({each.count(length)} of {len(each)} layers): "
            f"{times['median']:9.1f} ms, {times['median'] / length / full:.2f} of the time a token "
            "at full length"
        )
    lines.append(
        f"  its layers at these lengths take {found['least_ms']:.1f} ms, the pruned prefill "
        f"{found['pruned_ms']['median']:.1f} ms: {100 * found['reached']:.1f} % of the speed-up "
        "this machine allows"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
