"""Setting learned thresholds to a budget: ``atp-patch calibrate``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_patch.commands.calibrate_options import PROG, parser
from atp_patch.commands.pruning_options import trained
from atp_patch.contract.errors import ConfigError
from atp_patch.families import family_of
from atp_patch.patching.api import patch_model, require_patch
from atp_patch.patching.saving import adapter
from atp_patch.tools.calibration import Calibration, calibrate
from atp_patch.tools.command_line import execute, progress_bar, shows_progress
from atp_patch.tools.files import check_folder, replaced
from atp_patch.tools.loading import (
    choose_device,
    choose_dtype,
    load_model,
    quiet_transformers,
)
from atp_patch.tools.trained import Trained, merged
from atp_patch.training.dataset import SKIPPED, Samples, collate
from atp_patch.training.encode import Encoder
from atp_patch.training.settings import BUILTIN, Settings
from atp_patch.training.start import source_of


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit status of :func:`execute`."""
    return execute(parser(prog), _command, argv, memory="give a smaller --batch-size or --samples.")


def _command(args: argparse.Namespace) -> None:
    with quiet_transformers(progress=shows_progress(args)):
        found = run(args)
    if args.json:
        sys.stdout.write(json.dumps({"out": str(args.out), **asdict(found)}, indent=2) + "\n")
        return
    sys.stdout.write(
        f"{args.out}: from an average of {found.before:.1f} visual tokens to {found.after:.1f}, on "
        f"{found.samples} samples\n"
    )


def run(args: argparse.Namespace) -> Calibration:
    """Load the model and the adapter, calibrate it, and save it with its card.

    Raises:
        ATPError: where an argument or the data is wrong.
    """
    for flag, value in (("--samples", args.samples), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ConfigError(f"{flag} {value} must be at least 1.")
    check_folder(args.out, "--out")
    if args.out.exists():
        raise ConfigError(f"--out {args.out} is there already; give a new folder.")
    found = trained(args)
    if found is not None and args.layers is not None:
        raise ConfigError("--layers: --weights brings its own; leave it out.")

    def prune(model: Any) -> None:
        if found is not None:
            patch_model(model, weights=found.adapter)
        else:
            patch_model(model, args.layers, target_tokens=args.target_tokens, thresholds="learned")

    name = args.model or BUILTIN
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, processor = load_model(name, device, dtype, check=prune)
    prune(model)
    batches = _batches(args, name, model, processor)
    passes = 1 + len(require_patch(model).layers)
    with (
        merged(model, None if found is None else found.lora),
        progress_bar("passes over the data", passes) as advance,
    ):
        told = calibrate(model, batches, args.target_tokens, advance=advance)
    _save(model, args, found, told)
    return told


def _batches(args: argparse.Namespace, name: str, model: Any, processor: Any) -> list[Any]:
    """Return the first samples of the data as inputs of the model."""
    settings = Settings(
        model=name,
        data=str(args.data),
        images=None if args.images is None else str(args.images),
        samples=args.samples,
    )
    placeholders = family_of(model.config).placeholder_ids(model.config)
    encode = Encoder(processor, placeholders, None)
    samples = Samples(source_of(settings), encode, skip_bad=False)
    batches = []
    for start in range(0, len(samples), args.batch_size):
        chosen = [samples[i] for i in range(start, min(start + args.batch_size, len(samples)))]
        batch = collate(chosen, pad_id=encode.pad_id)
        batches.append({key: value for key, value in batch.items() if key != SKIPPED})
    return batches


def _save(model: Any, args: argparse.Namespace, found: Trained | None, told: Calibration) -> None:
    """Write the adapter, and the LoRA beside it, as a training's folder has them."""
    data = "built-in scenes" if args.data == BUILTIN else Path(args.data).name
    with replaced(args.out) as scratch:
        saved = adapter(model, beside=None if found is None or found.lora is None else "lora")
        saved.place = str(args.out)
        saved.section = (
            "## Calibration\n\n"
            f"Thresholds were set on {told.samples} samples of {data}: from an average of "
            f"{told.before:.1f} visual tokens over all layers to {told.after:.1f}."
        )
        if found is None or found.lora is None:
            saved.save_pretrained(scratch)
            return
        scratch.mkdir()
        saved.save_pretrained(scratch / "adapter")
        shutil.copytree(found.lora, scratch / "lora")
