"""The results of the demo, printed as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from atp_patch.bench.measure import Measured
from atp_patch.builtin import NAMES
from atp_patch.patching.api import require_patch
from atp_patch.patching.trace import PruningTrace

if TYPE_CHECKING:
    from rich.console import Console

BUILTIN_NOTE = (
    "It is small and knows generated scenes only, such as those in examples/scenes; --model takes "
    "the folder or Hub id of another."
)


@dataclass(frozen=True)
class LayerRow:
    """What happened at one pruning layer.

    Attributes:
        layer: number of the decoder layer.
        tokens_in: number of visual tokens before pruning.
        tokens_kept: number of visual tokens after pruning.
        thresholds: the thresholds by name; empty if the method has none.
    """

    layer: int
    tokens_in: int
    tokens_kept: int
    thresholds: dict[str, float]


@dataclass(frozen=True)
class Times:
    """Medians of plain and pruned runs, which alternate.

    Attributes:
        prefill_ms_plain, prefill_ms: milliseconds up to the logits of the first token, vision tower
            included.
        prefill_speedup: plain time divided by pruned time.
        decode_ms_plain, decode_ms: milliseconds for each token after the first.
        decode_speedup: plain time divided by pruned time.
        runs: number of timed runs of each kind, after a warm-up.
        decode_tokens: number of tokens decoded in each run.
    """

    prefill_ms_plain: float
    prefill_ms: float
    prefill_speedup: float
    decode_ms_plain: float
    decode_ms: float
    decode_speedup: float
    runs: int
    decode_tokens: int

    @classmethod
    def of(cls, plain: Measured, pruned: Measured, runs: int, decode_tokens: int) -> Times:
        """Make the medians from plain and pruned measurements."""
        prefill = plain.prefill.median_ms, pruned.prefill.median_ms
        decode = plain.decode.median_ms, pruned.decode.median_ms
        return cls(
            prefill_ms_plain=prefill[0],
            prefill_ms=prefill[1],
            prefill_speedup=prefill[0] / prefill[1],
            decode_ms_plain=decode[0],
            decode_ms=decode[1],
            decode_speedup=decode[0] / decode[1],
            runs=runs,
            decode_tokens=decode_tokens,
        )


@dataclass(frozen=True)
class Report:
    """Everything that the demo prints.

    Attributes:
        model: name of the model.
        note: what a user should know about the model, or None.
        device, dtype: where and in which type the model ran.
        image, question: the image file and the question.
        method: name of the method.
        answer_plain, answer_pruned: both answers.
        visual_tokens: number of visual tokens before pruning.
        average_tokens: number of visual tokens averaged over all decoder layers.
        tokens_per_layer: number of visual tokens that enter each decoder layer.
        layers: what happened at each pruning layer.
        flops_plain, flops: FLOPs of the decoder's prefill.
        kv_bytes_plain, kv_bytes: bytes of the key/value cache after the prefill.
        times: the measured times.
        overlay: the file of the drawing of kept tokens, or None.
    """

    model: str
    note: str | None
    device: str
    dtype: str
    image: str
    question: str
    method: str
    answer_plain: str
    answer_pruned: str
    visual_tokens: int
    average_tokens: float
    tokens_per_layer: list[int]
    layers: list[LayerRow]
    flops_plain: float
    flops: float
    kv_bytes_plain: int
    kv_bytes: int
    times: Times
    overlay: str | None

    @classmethod
    def of(
        cls,
        args: argparse.Namespace,
        model: Any,
        trace: PruningTrace,
        answers: tuple[str, str],
        times: Times,
    ) -> Report:
        """Make the report from the arguments, the patched model, its trace and the answers."""
        return cls(
            model=args.model or "the built-in model",
            note=BUILTIN_NOTE if args.model in (None, *NAMES) else None,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            image=str(args.image),
            question=args.question,
            method=require_patch(model).config.name,
            answer_plain=answers[0],
            answer_pruned=answers[1],
            visual_tokens=trace.layout.totals[0],
            average_tokens=trace.average_tokens,
            tokens_per_layer=trace.tokens_per_layer[0].tolist(),
            layers=layer_rows(trace),
            flops_plain=trace.flops_plain,
            flops=trace.flops,
            kv_bytes_plain=trace.kv_bytes_plain,
            kv_bytes=trace.kv_bytes,
            times=times,
            overlay=str(args.overlay) if args.overlay else None,
        )

    def to_json(self) -> str:
        """Return one JSON object; times are in milliseconds."""
        data: dict[str, Any] = asdict(self)
        data["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        return json.dumps(data, indent=2, ensure_ascii=False)


def layer_rows(trace: PruningTrace, sample: int = 0) -> list[LayerRow]:
    """Return the rows of the table for one sample of a forward pass."""
    counts = trace.tokens_per_layer[sample].tolist()
    return [
        LayerRow(
            layer=layer,
            tokens_in=counts[layer - 1] if layer else trace.layout.totals[sample],
            tokens_kept=counts[layer],
            thresholds={
                name: float(value[sample]) for name, value in layer_trace.thresholds.items()
            },
        )
        for layer, layer_trace in trace.layers.items()
    ]


def print_report(report: Report, console: Console) -> None:
    """Print the report as text and tables."""
    from rich.markup import escape
    from rich.table import Table

    say = console.print
    say(f"[bold]{escape(report.model)}[/] on {report.device}, {report.dtype}")
    if report.note:
        say(report.note)
    say(f"\nQ: {escape(report.question)}")
    say(f"plain answer:  [bold]{escape(report.answer_plain)}[/]")
    say(f"pruned answer: [bold]{escape(report.answer_pruned)}[/]  (method {report.method})\n")

    pruning = Table()
    for column in ("before layer", "visual tokens in", "kept", "thresholds"):
        pruning.add_column(column, justify="left" if column == "thresholds" else "right")
    for row in report.layers:
        thresholds = ", ".join(f"{name} {value:.3f}" for name, value in row.thresholds.items())
        pruning.add_row(str(row.layer), str(row.tokens_in), str(row.tokens_kept), thresholds or "-")
    say(pruning)

    times = report.times
    costs = Table()
    for column in ("", "plain", "pruned", "plain / pruned"):
        costs.add_column(column, justify="right" if column else "left")
    for name, plain, pruned, form in (
        ("visual tokens, mean over layers", report.visual_tokens, report.average_tokens, "{:.1f}"),
        ("decoder prefill, GFLOPs", report.flops_plain / 1e9, report.flops / 1e9, "{:.2f}"),
        ("key/value cache, MB", report.kv_bytes_plain / 1e6, report.kv_bytes / 1e6, "{:.2f}"),
        ("time to first token, ms", times.prefill_ms_plain, times.prefill_ms, "{:.1f}"),
        ("each token after it, ms", times.decode_ms_plain, times.decode_ms, "{:.2f}"),
    ):
        costs.add_row(name, form.format(plain), form.format(pruned), f"{plain / pruned:.2f}x")
    say(costs)
    say(
        f"Times are medians of {times.runs} runs of each, in turns, after a warm-up; "
        f"{times.decode_tokens} tokens decoded after the first.",
    )
    if report.overlay:
        say(f"Surviving tokens at each pruning layer: {escape(report.overlay)}")
