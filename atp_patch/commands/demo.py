"""The demo: ask a model about an image, plain and pruned, and show what was saved.

    python -m atp_patch.demo IMAGE "QUESTION" [options]
    python -m atp_patch.demo --web [options]

The exit status is 0, or 2 with one line on stderr if the input is wrong, or 130 if it was stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from atp_patch.bench.measure import Contender, compare
from atp_patch.builtin import NAMES
from atp_patch.commands.demo_options import PROG, check, parser
from atp_patch.commands.demo_report import Report, Times, print_report
from atp_patch.commands.pruning_options import patch_settings, trained
from atp_patch.contract.errors import ConfigError
from atp_patch.patching.api import disabled, last_trace, patch_model
from atp_patch.tools.command_line import execute, shows_progress
from atp_patch.tools.files import replaced
from atp_patch.tools.generation import GREEDY
from atp_patch.tools.loading import (
    choose_device,
    choose_dtype,
    encode,
    first_line,
    load_model,
    quiet_transformers,
)
from atp_patch.tools.pictures import read_image
from atp_patch.tools.trained import merged
from atp_patch.visualize import Drawing, overlay, with_pictures

DECODE_TOKENS = 16
RUNS, SLOW_RUNS, SLOW_SECONDS = 5, 2, 10.0


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit status of :func:`execute`."""
    return execute(parser(prog), _command, argv)


def _command(args: argparse.Namespace) -> None:
    bars = args.model not in (None, *NAMES) and shows_progress(args)
    with quiet_transformers(progress=bars):
        check(args)
        if args.web:
            show_page(args)
            return
        console = None if args.json else _console()
        report = run(args)
    if console is None:
        print(report.to_json())
    else:
        print_report(report, console)


def run(args: argparse.Namespace) -> Report:
    """Load the model, answer plain and pruned, draw the kept tokens, and time both.

    Raises:
        ATPError: if an argument is wrong.
    """
    image = read_image(args.image)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    found = trained(args)

    def prune(model: Any) -> None:
        patch_model(model, **patch_settings(args, found))

    name = args.model or next(iter(NAMES))
    model, processor = load_model(name, device, dtype, check=prune)
    if name not in NAMES:
        print("Answering and timing ...", file=sys.stderr)
    prune(model)
    inputs = encode(processor, image, args.question, model)
    with disabled(model):
        plain, _ = answer(model, processor, inputs, args.max_new_tokens)
    with merged(model, None if found is None else found.lora):
        pruned, seconds = answer(model, processor, inputs, args.max_new_tokens)
    trace = last_trace(model)
    if args.overlay is not None:
        shown = with_pictures(
            trace, image, inputs, processor, question=args.question, answer=pruned
        )
        _write(overlay(shown), args.overlay)
    runs = RUNS if seconds < SLOW_SECONDS else SLOW_RUNS
    times = compare(
        model,
        [Contender("plain", lambda: disabled(model), prunes=False), Contender("pruned")],
        dict(inputs),
        runs=runs,
        decode_tokens=DECODE_TOKENS,
        with_overhead=False,
    )
    medians = Times.of(times["plain"], times["pruned"], runs, DECODE_TOKENS)
    return Report.of(args, model, trace, (plain, pruned), medians)


def show_page(args: argparse.Namespace) -> None:
    """Load the model and show the web page until Ctrl-C.

    Raises:
        ATPError: if an argument is wrong.
    """
    from atp_patch.web.engine import Engine, Pruning
    from atp_patch.web.page import SHARE, serve

    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    start = Pruning(args.method or "atp", SHARE, tuple(args.layers or ()))

    def prune(model: Any) -> None:
        patch_model(model, **start.settings)

    name = args.model or next(iter(NAMES))
    model, processor = load_model(name, device, dtype, check=prune)
    prune(model)  # a wrong argument is an error now, and not on the page
    engine = Engine(model, processor, name, args.max_new_tokens)
    serve(engine, NAMES.get(name), start, args.port)


def answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> tuple[str, float]:
    """Return the greedy answer and the time that it took in seconds."""
    start = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = str(processor.decode(new, skip_special_tokens=True)).strip()
    return text, time.perf_counter() - start


def _write(drawing: Drawing, path: Path) -> None:
    try:
        with replaced(path) as scratch:
            drawing.save(scratch)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--overlay {path} cannot be written ({first_line(error)}); give another file."
        ) from error


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ConfigError(
            "tables need the package rich: pip install 'atp-patch[demo]', or give --json."
        ) from error
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)
