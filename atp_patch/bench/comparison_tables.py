"""Comparisons of pruned models with the plain one, as plain data and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from atp_patch.bench.lengths import SameLengths
from atp_patch.bench.measure import PLAIN, Measured
from atp_patch.maths import paper_layer_flops
from atp_patch.patching.trace import PruningTrace
from atp_patch.patching.voco import VoCoTrace


def entries(found: dict[str, Measured], batch_size: int) -> dict[str, dict[str, Any]]:
    """The figures of each contender as plain data.

    Those relative to the plain model stand under "against_plain". Speed-ups are ratios of medians;
    "pairs" holds the least and the greatest ratio of a single round.
    """
    trace = next(one.trace for one in found.values() if one.trace is not None)
    result = {}
    for name, one in found.items():
        entry = _entry(one, trace, batch_size)
        if one.trace is not None:
            entry["against_plain"] = _against(found[PLAIN], one)
        result[name] = entry
    return result


def _entry(one: Measured, example: PruningTrace, batch_size: int) -> dict[str, Any]:
    trace = one.trace or example
    each = trace.tokens_per_layer.float()  # (samples, layers)
    full = torch.tensor(trace.layout.totals, dtype=torch.float32)[:, None].expand_as(each)
    if one.trace is None:
        each = full
    read = full if isinstance(trace, VoCoTrace) else each
    decode = one.decode.spread()
    return {
        "average_tokens": float(each.mean()),
        "tokens_per_layer": each.mean(0).tolist(),
        "vision_ms": one.vision.spread(),
        "decoder_ms": one.decoder.spread(),
        "prefill_ms": one.prefill.spread(),
        "overhead_ms": one.overhead.spread(),
        "decode_ms": decode,
        "tokens_per_second": None if decode is None else 1000 * batch_size / decode["median"],
        "kv_bytes": one.kv_bytes,
        "state_bytes": one.state_bytes,
        "peak_bytes": one.peak_bytes,
        "flops": trace.flops_plain if one.trace is None else trace.flops,
        "paper_flops": _paper_flops(trace, read),
    }


def _paper_flops(trace: PruningTrace, visual: Tensor) -> float:
    """FLOPs by eq. 15 as the paper prints it, summed over samples and layers, with the text.

    Args:
        trace: the trace of the forward pass.
        visual: (B, layers) visual tokens in each layer.
    """
    shape = trace.shape
    return sum(
        paper_layer_flops(count + text, shape.hidden_size, mlp_size)
        for counts, text in zip(visual.tolist(), trace.text_tokens, strict=True)
        for count, mlp_size in zip(counts, shape.mlp_sizes, strict=True)
    )


def _against(plain: Measured, one: Measured) -> dict[str, Any]:
    assert one.trace is not None
    pairs = zip(plain.decoder.values_ms, one.decoder.values_ms, strict=True)
    single = [before / after for before, after in pairs]
    speedup = plain.decoder.median_ms / one.decoder.median_ms
    ratio = one.trace.flops_plain / one.trace.flops
    return {
        "decoder_speedup": speedup,
        "pairs": [min(single), max(single)],
        "prefill_speedup": plain.prefill.median_ms / one.prefill.median_ms,
        "flops_ratio": ratio,
        "efficiency": speedup / ratio,
        "overhead_share": one.overhead.median_ms / one.decoder.median_ms,
    }


def same_lengths(found: SameLengths) -> dict[str, Any]:
    """The figures of a profile as plain data."""
    return {
        "layer_lengths": found.layer_lengths,
        "plain_ms": {length: times.spread() for length, times in found.plain.items()},
        "pruned_ms": found.pruned.spread(),
        "least_ms": found.least_ms,
        "reached": found.reached,
    }


def _states(columns: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The row of recurrent and convolution states, where some layers keep them."""
    sizes = [column.get("state_bytes", 0) for column in columns.values()]
    return [("states MB", [f"{size / 1e6:.1f}" for size in sizes])] if any(sizes) else []


def table(case: dict[str, Any]) -> str:
    """The table of one case, with a column for each contender."""
    columns = case["contenders"]
    rows = [
        ("visual tokens, average", [f"{c['average_tokens']:.1f}" for c in columns.values()]),
        *(
            (label, [milliseconds(c[key]) for c in columns.values()])
            for label, key in (
                ("vision ms", "vision_ms"),
                ("decoder prefill ms", "decoder_ms"),
                ("time to first token ms", "prefill_ms"),
                ("score, choose, merge, gather ms", "overhead_ms"),
                ("decode ms/token", "decode_ms"),
            )
        ),
        ("decode tokens/s", [_number(c["tokens_per_second"], "{:.1f}") for c in columns.values()]),
        ("KV cache MB", [f"{c['kv_bytes'] / 1e6:.1f}" for c in columns.values()]),
        *_states(columns),
        ("peak memory GB", [_number(c["peak_bytes"], "{:.2f}", 1e9) for c in columns.values()]),
        ("prefill TFLOPs", [f"{c['flops'] / 1e12:.3f}" for c in columns.values()]),
        ("TFLOPs as in eq. 15", [f"{c['paper_flops'] / 1e12:.3f}" for c in columns.values()]),
        ("first token's speed-up", [_against_cell(c, "prefill_speedup") for c in columns.values()]),
        ("decoder speed-up", [_against_cell(c, "decoder_speedup") for c in columns.values()]),
        ("FLOPs ratio", [_against_cell(c, "flops_ratio") for c in columns.values()]),
        ("speed-up / FLOPs ratio", [_against_cell(c, "efficiency") for c in columns.values()]),
        ("overhead / decoder", [_share_cell(c) for c in columns.values()]),
    ]
    head = ["", *columns]
    grid = [head, *([label, *cells] for label, cells in rows)]
    widths = [max(len(row[k]) for row in grid) for k in range(len(head))]
    lines = [
        heading(case),
        "",
    ]
    for number, row in enumerate(grid):
        right = zip(row[1:], widths[1:], strict=True)
        cells = [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in right)]
        lines.append("| " + " | ".join(cells) + " |")
        if number == 0:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for name, column in columns.items():
        if "same_lengths" in column:
            lines += ["", *_profile_lines(name, column["same_lengths"])]
    return "\n".join(lines) + "\n"


def heading(case: dict[str, Any]) -> str:
    """A line that says on which input a case was measured, and how often."""
    width, height = case["image"]
    return (
        f"image {width}x{height}, {case['visual_tokens']} visual tokens, "
        f"{case['prompt_tokens']} text tokens, batch {case['batch_size']}; "
        f"{case['runs']} rounds in turns, median [quartiles]"
    )


def listing(case: dict[str, Any], head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table of one case, with a row for each way to do it, which begins with its name."""
    return f"{heading(case)}\n\n{markdown(head, rows)}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, whose first column holds names and whose others hold numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def milliseconds(spread: dict[str, Any] | None) -> str:
    """A median with its quartiles in brackets; "-" where nothing was timed."""
    if spread is None:
        return "-"
    return f"{spread['median']:.1f} [{spread['q1']:.1f}, {spread['q3']:.1f}]"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value / unit)


def _against_cell(column: dict[str, Any], key: str) -> str:
    return f"{column['against_plain'][key]:.3f}" if "against_plain" in column else "-"


def _share_cell(column: dict[str, Any]) -> str:
    if "against_plain" not in column:
        return "-"
    return f"{100 * column['against_plain']['overhead_share']:.2f} %"


def _profile_lines(name: str, found: dict[str, Any]) -> list[str]:
    each = found["layer_lengths"]
    longest = max(each)
    full = found["plain_ms"][longest]["median"] / longest
    lines = [f"where the time of {name} goes: the plain model on as many tokens as it leaves"]
    for length, times in found["plain_ms"].items():
        lines.append(
            f"  {length:>5} tokens ({each.count(length)} of {len(each)} layers): "
            f"{times['median']:9.1f} ms, {times['median'] / length / full:.2f} of the time a token "
            "at full length"
        )
    lines.append(
        f"  its layers at these lengths take {found['least_ms']:.1f} ms, the pruned decoder "
        f"{found['pruned_ms']['median']:.1f} ms: {100 * found['reached']:.1f} % of the speed-up "
        "this machine allows"
    )
    return lines
