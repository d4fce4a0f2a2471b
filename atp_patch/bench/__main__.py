"""The command ``python -m atp_patch.bench``: it builds a model, measures it, and prints tables."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from atp_patch.bench.comparison_tables import entries, same_lengths, table
from atp_patch.bench.follow_up import compare_questions, questions_case, questions_table
from atp_patch.bench.growth import FEWEST_SIZES, draw_growths, growth_table, growths
from atp_patch.bench.lengths import time_same_lengths
from atp_patch.bench.measure import PLAIN, Contender, compare, patched
from atp_patch.bench.options import PROG, STDOUT, check_mode, parser
from atp_patch.bench.plot import check_plot, draw
from atp_patch.bench.presets import PRESETS, Preset, Size, describe
from atp_patch.bench.report_page import page
from atp_patch.bench.training import WAYS, as_data, compare_steps, steps_table
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation.identity import today
from atp_patch.families import family_of
from atp_patch.maths import average_tokens
from atp_patch.methods import make_methods
from atp_patch.tools.command_line import execute, machine, progress_bar
from atp_patch.tools.files import write_text
from atp_patch.tools.loading import choose_device, choose_dtype, first_line
from atp_patch.tools.method_spec import read_method_spec
from atp_patch.version import __version__

_OUTPUTS = {"json", "plot", "growth_plot", "report", "quiet"}


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; returns the exit status, as :func:`execute` says."""
    memory = "give a smaller --scale, or smaller numbers for --batch-size."
    given = sys.argv[1:] if argv is None else argv
    work = partial(_command, command=f"{prog} {shlex.join(given)}")
    return execute(parser(prog), work, given, memory=memory)


def _command(args: argparse.Namespace, command: str) -> None:
    for name in ("json", "plot", "growth_plot", "report"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} {path}: give a file in a folder that is there.")
    if args.preset not in PRESETS:
        raise ConfigError(f"--preset {args.preset!r}: give one of {', '.join(sorted(PRESETS))}.")
    alone = args.json == STDOUT
    with redirect_stdout(io.StringIO()) if alone else nullcontext():
        report = run(args)
    if alone:
        sys.stdout.write(json.dumps(report, indent=1, default=str) + "\n")
    if args.plot is not None:
        draw(report["cases"], report["model"], args.plot)
    if args.growth_plot is not None:
        draw_growths(report["growth"], report["model"], args.growth_plot)
    if args.report is not None:
        write_text(args.report, page(report, command))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build a model, measure each case, and print its table.

    Returns:
        everything that was measured, as plain data.

    Raises:
        ATPError: where an argument is wrong.
    """
    if args.plot is not None or args.growth_plot is not None:
        check_plot()
    check_mode(args)
    for name in ("runs", "batch_size", "prompt_tokens"):
        values = getattr(args, name)
        each = values if isinstance(values, list) else [values]
        if not all(1 <= value < 2**31 for value in each):
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1 and below 2**31.")
    if not 0 <= args.decode_tokens < 2**31:
        raise ConfigError("--decode-tokens must be 0 or more and below 2**31.")
    preset = PRESETS[args.preset]
    images = args.image or [preset.image]
    if args.growth_plot is not None:
        sizes = {preset.visual_tokens(image) for image in images}
        if len(sizes) < FEWEST_SIZES:
            raise ConfigError(
                f"--growth-plot: give --image {FEWEST_SIZES} sizes or more that have different "
                f"numbers of visual tokens; there are {len(sizes)}."
            )
    depth = preset.depth(args.scale)
    settings = {image: _settings(args, preset, image, depth.decoder) for image in images}
    device = choose_device(args.device)
    args.device, dtype = str(device), choose_dtype(args.dtype, device)
    try:
        _check_patches(args, preset.build(args.scale, args.attn, "meta", dtype), settings.values())
        torch.manual_seed(args.seed)
        model: Any = preset.build(args.scale, args.attn, args.device, dtype)
    except ImportError as error:
        raise ConfigError(f"--attn {args.attn}: {first_line(error)}") from error
    scaled = "" if args.scale == 1 else f", scaled to {args.scale:g} of its layers"
    report: dict[str, Any] = {
        "atp_patch": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": machine(device),
        "model": f"{args.preset}{scaled}: {describe(model)}, {str(dtype).removeprefix('torch.')}",
        "date": today(),
        "settings": {
            name: value
            for name, value in vars(args).items()
            if name not in _OUTPUTS and value is not None
        },
        "cases": [],
    }
    sys.stdout.write(
        f"{report['model']}\n{report['machine']}, {report['date']}; atp_patch {__version__}, "
        f"torch {report['torch']}, transformers {report['transformers']}\n"
    )
    for image, batch_size, prompt in product(images, args.batch_size, args.prompt_tokens):
        inputs = _to(preset.inputs(image, batch_size, prompt, args.seed), args.device, dtype)
        if args.train or args.follow_up:
            report["cases"].append(_special_case(args, model, preset, image, inputs))
            _write(report, args.json)
            continue
        contenders = [patched(model, name, given) for name, given in settings[image].items()]
        case = _case(args, model, contenders, inputs)
        case |= {"image": list(image), "visual_tokens": preset.visual_tokens(image)}
        report["cases"].append(case)
        sys.stdout.write("\n" + table(case))
        sys.stdout.flush()
        _write(report, args.json)
    if not (args.train or args.follow_up):
        report["growth"] = growths(report["cases"])
        for growth in report["growth"]:
            sys.stdout.write("\n" + growth_table(growth))
        _write(report, args.json)
    return report


def _write(report: dict[str, Any], file: Path | None) -> None:
    """Write the report so far. It is written after each case, as memory may fail in the next."""
    if file is not None and file != STDOUT:
        write_text(file, json.dumps(report, indent=1) + "\n")


def _special_case(
    args: argparse.Namespace, model: Any, preset: Preset, image: Size, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Measure what ``--train`` or ``--follow-up`` asks for, and print its table."""
    ids = inputs["input_ids"]
    config = model.config
    visual = family_of(config).placeholder_ids(config)
    text = ~torch.isin(ids, torch.tensor(visual, device=ids.device))
    about = {
        "image": list(image),
        "visual_tokens": preset.visual_tokens(image),
        "batch_size": ids.shape[0],
        "prompt_tokens": int(text[0].sum()),
        "runs": args.runs,
    }
    if args.follow_up:
        pairs = (args.runs + 1) * (2 + len(args.follow_up))
        with progress_bar("pairs of questions", pairs) as advance:
            asked = compare_questions(
                model, inputs, text, args.follow_up, runs=args.runs, advance=advance
            )
        case = questions_case(asked, about)
        sys.stdout.write("\n" + questions_table(case))
    else:
        layers = args.layers or preset.pruning_layers(config.get_text_config().num_hidden_layers)
        checkpointing = args.gradient_checkpointing
        with progress_bar("steps", (args.runs + 1) * len(WAYS)) as advance:
            steps = compare_steps(
                model,
                layers,
                inputs,
                text,
                runs=args.runs,
                gradient_checkpointing=checkpointing,
                advance=advance,
            )
        case = {**about, "gradient_checkpointing": checkpointing, "ways": as_data(steps)}
        sys.stdout.write("\n" + steps_table(case))
    sys.stdout.flush()
    return case


def _case(
    args: argparse.Namespace, model: Any, contenders: Sequence[Contender], inputs: dict[str, Any]
) -> dict[str, Any]:
    batch_size = inputs["input_ids"].shape[0]
    everyone = [Contender(PLAIN, prunes=False), *contenders]
    passes = args.runs * (2 * len(everyone) - 1) + len(everyone)
    with progress_bar("passes", passes) as advance:
        found = compare(
            model,
            everyone,
            inputs,
            runs=args.runs,
            decode_tokens=args.decode_tokens,
            advance=advance,
        )
    columns = entries(found, batch_size)
    for contender in contenders:
        trace = found[contender.name].trace
        if args.profile and trace is not None:
            with progress_bar(f"rounds at {contender.name}'s lengths", args.runs + 1) as advance:
                timed = time_same_lengths(
                    model, contender, inputs, trace, runs=args.runs, advance=advance
                )
            columns[contender.name]["same_lengths"] = same_lengths(timed)
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
    """The arguments of ``patch_model`` for each method, by the name that the method was given."""
    total = preset.visual_tokens(image)
    found: dict[str, dict[str, Any]] = {}
    budgeted = False
    for text in args.methods.split(","):
        spec = read_method_spec(text)
        if spec.budgets is not None:
            raise ConfigError(
                f"--methods {text}: give --keep, --target-tokens or --schedule, for all."
            )
        methods = make_methods(spec.stages, {})
        if args.profile and methods.voco is not None:
            raise ConfigError(f"--profile: {spec.name} reads every token once; leave it out.")
        given: dict[str, Any] = {"method": spec.stages}
        if methods.layer is not None:
            own = None if spec.layers is None else list(spec.layers)
            given["layers"] = own or args.layers or preset.pruning_layers(num_layers)
        if methods.voco is None:  # its number of tokens is its budget
            budgeted = True
            if args.schedule is not None and spec.layers:
                # Before its own layers a method keeps as many tokens on average.
                at = args.layers or preset.pruning_layers(num_layers)
                _shares(args.schedule, total, at)
                given["target_tokens"] = average_tokens(total, args.schedule, at, num_layers)
            elif args.schedule is not None:
                given["keep"] = _shares(args.schedule, total, given.get("layers"))
            elif args.keep is not None or args.target_tokens is not None:
                given |= {"keep": args.keep, "target_tokens": args.target_tokens}
        found[text] = given
    if args.layers and not any("layers" in given for given in found.values()):
        raise ConfigError("--layers: none of --methods prunes inside the decoder; leave it out.")
    budget = (args.keep, args.target_tokens, args.schedule)
    if any(budget) and not budgeted:
        raise ConfigError("voco: its number of tokens is its budget; leave out other budgets.")
    return found


def _check_patches(
    args: argparse.Namespace, shape: Any, settings: Iterable[dict[str, dict[str, Any]]]
) -> None:
    """Try every patch on a model without weights, before minutes go into building one with weights.

    Raises:
        ATPError: where a method's name, layers or budget are wrong for the model.
    """
    if args.follow_up:  # which measures VoCo alone, and no method of --methods
        return
    learned = {"thresholds": "learned"} if args.train else {}
    for name, given in (item for one in settings for item in one.items()):
        with patched(shape, name, given | learned).applied():
            pass


def _shares(schedule: Sequence[int], total: int, layers: Sequence[int] | None) -> list[float]:
    """For each pruning layer, the share of its visual tokens that leaves the scheduled count."""
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


if __name__ == "__main__":
    sys.exit(main())
