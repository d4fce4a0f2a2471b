"""The command of training: it loads and patches a model, trains it, and saves what it learned."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from atp_patch.builtin import NAMES
from atp_patch.builtin.silent import silent_layers, without
from atp_patch.contract.errors import ATPError, ConfigError, InputError
from atp_patch.families import family_of
from atp_patch.patching.adapter_card import Beside
from atp_patch.patching.api import require_patch
from atp_patch.patching.patch import MODULE_NAME
from atp_patch.patching.saving import adapter
from atp_patch.tools.calibration import Calibration, calibrate
from atp_patch.tools.command_line import execute, progress_bar, shows_progress
from atp_patch.tools.files import parse_json, replaced, write_text
from atp_patch.tools.loading import choose_device, quiet_transformers
from atp_patch.tools.parameter_groups import add_lora, freeze
from atp_patch.training.card import card
from atp_patch.training.checkpoints import (
    ADAPTER,
    LORA,
    MODEL,
    SETTINGS_FILE,
    at_its_end,
    checkpoint_of,
)
from atp_patch.training.dataset import SKIPPED, Samples, collate
from atp_patch.training.encode import Encoder
from atp_patch.training.options import PROG, flags_of, parser
from atp_patch.training.progress import Progress
from atp_patch.training.records import Source, check_source
from atp_patch.training.settings import Settings, read_settings
from atp_patch.training.start import load, patch, source_of
from atp_patch.training.trainer import PruningTrainer, arguments
from atp_patch.training.zero3 import whole_model


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; returns the exit status, as :func:`execute` says."""
    return execute(
        parser(prog),
        _command,
        argv,
        memory="give a smaller micro_batch_size.",
        stopped="stopped; --resume goes on from the newest checkpoint.",
    )


def _command(args: argparse.Namespace) -> None:
    with quiet_transformers(progress=shows_progress(args)):
        settings = read_settings(args.file, flags_of(args))
        saved = train(settings, resume=args.resume, token=getattr(args, "token", None))
    if getattr(args, "json", False) and saved.is_dir():
        sys.stdout.write(json.dumps(_told(Path(settings.out), saved), indent=2) + "\n")


def _told(out: Path, adapter: Path) -> dict[str, Any]:
    """Return what ``--json`` prints: where the results are, and the last entry of the log."""
    state = parse_json((out / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    logged = [entry for entry in state["log_history"] if "next_token" in entry]
    beside = next((name for name in (LORA, MODEL) if (out / name).is_dir()), None)
    return {
        "adapter": str(adapter),
        "beside": None if beside is None else str(out / beside),
        "steps": state["global_step"],
        "last": logged[-1] if logged else {},
    }


def train(settings: Settings, resume: bool = False, token: str | None = None) -> Path:
    """Train as the settings say.

    Args:
        resume: whether to go on from the newest checkpoint in ``settings.out``.
        token: the token to read ``settings.adapter`` from the Hub with.

    Returns:
        the adapter's folder.

    Raises:
        ATPError: where a setting or the data is wrong, or the training to resume is finished. Where
            it is raised during the training, a checkpoint holds what was learned until then.
    """
    _check_trainer()
    checkpoint = checkpoint_of(settings, resume)
    source = source_of(settings)
    check_source(source, settings.skip_bad)
    if source.problems:
        sys.stderr.write(f"{len(source.problems)} bad samples of {source.name} are left out.\n")
    device = choose_device(settings.device)
    args = arguments(settings, device)
    if settings.text_only and args.world_size > 1:
        raise ConfigError(
            "text_only: processes would wait for each other where one alone has an image; leave "
            "it out, or train in one process."
        )
    set_seed(settings.seed)
    with whole_model(args):
        model, processor = load(settings, token)
        set_seed(settings.seed)  # so that the heads start alike, however much loading has drawn
        patch(model, settings, token)
        freeze(model, settings.freeze_lm)
        # Layers that add nothing do not change what is trained, unless they learn too.
        silent = silent_layers(model) if settings.model in NAMES and settings.freeze_lm else ()
        if settings.lora_rank:
            add_lora(model, settings.lora_rank, settings.lora_alpha, leave_out=silent)
    placeholders = family_of(model.config).placeholder_ids(model.config)
    encode = Encoder(processor, placeholders, settings.max_length)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    progress = Progress()
    trainer = PruningTrainer(
        settings,
        model=model,
        args=args,
        train_dataset=Samples(source, encode, settings.skip_bad),
        data_collator=partial(collate, pad_id=encode.pad_id),
        callbacks=[progress],
    )
    trainer.remove_callback(ProgressCallback)
    if args.process_index == 0:
        folder = Path(settings.out)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings.to_dict(), indent=2)
        write_text(folder / SETTINGS_FILE, text + "\n")
    scored = [layer - 1 for layer in require_patch(model).config.layers]
    with without(model, silent, scored):
        try:
            if checkpoint is not None and at_its_end(Path(checkpoint)):
                trainer.restore(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=checkpoint)
        except (ATPError, KeyboardInterrupt) as error:
            # Where a loss is not finite, the weights may not be finite either.
            sound = isinstance(error, (InputError, KeyboardInterrupt))
            saved = trainer.save_now() if sound else None
            if saved is not None and isinstance(error, InputError):
                mend = "mend it, or add --skip-bad, and go on with --resume."
                raise InputError(f"{error} What was learned is in {saved}: {mend}") from error
            raise
        finally:
            progress.close()
        trainer.skipped |= set(source.problems)
        calibration = calibrated(trainer)
    return save(trainer, processor, source, calibration)


def calibrated(trainer: PruningTrainer) -> Calibration | None:
    """Set the thresholds to the budget on the first samples.

    Returns:
        what changed; None where the settings do not ask for it, or it cannot be done, which is said
        on stderr.
    """
    settings, samples = trainer.settings, trainer.train_dataset
    if not settings.calibrate:
        return None
    size = trainer.args.per_device_train_batch_size
    batches = []
    try:
        chosen = [samples[i] for i in range(min(settings.calibrate, len(samples)))]
        chosen = [sample for sample in chosen if any(k.startswith("pixel_values") for k in sample)]
        for start in range(0, len(chosen), size):
            batch = trainer.data_collator(chosen[start : start + size])
            batches.append({name: value for name, value in batch.items() if name != SKIPPED})
        passes = 1 + len(require_patch(trainer.model).layers)
        first = trainer.args.process_index == 0
        with progress_bar("passes over the data", passes, shown=first) as advance:
            return calibrate(trainer.model, batches, advance=advance)
    except (ConfigError, InputError) as error:  # what was learned must still be saved
        sys.stderr.write(f"Not calibrated: {error}\n")
        return None


def save(
    trainer: PruningTrainer, processor: Any, source: Source, calibration: Calibration | None
) -> Path:
    """Write the adapter with its card, and the model or its LoRA where they learned.

    Returns:
        the adapter's folder, which is written last and whole.
    """
    settings, model = trainer.settings, trainer.model
    out = Path(settings.out)
    state = trainer.whole_state()
    trainer.save_state()
    if not trainer.args.should_save:
        return out / ADAPTER
    beside: Beside | None = None
    if settings.lora_rank or not settings.freeze_lm:
        beside = LORA if settings.lora_rank else MODEL
    rest = {k: v for k, v in state.items() if not k.startswith(MODULE_NAME + ".")}
    if settings.lora_rank:
        model.save_pretrained(out / LORA, state_dict=rest)
    elif not settings.freeze_lm:
        model.save_pretrained(out / MODEL, state_dict=rest)
        processor.save_pretrained(out / MODEL)
    saved = adapter(model, state, beside)
    history, data = trainer.state.log_history, source.name
    saved.section = card(settings, history, len(source), trainer.skipped, data, calibration)
    saved.place = str(out / ADAPTER if beside is None else out)
    with replaced(out / ADAPTER) as scratch:  # where it is there, the training is finished
        saved.save_pretrained(scratch)
    also = "" if beside is None else f" and {out / beside}, which goes with it"
    sys.stderr.write(f"Saved {out / ADAPTER}{also}.\n")
    return out / ADAPTER


def _check_trainer() -> None:
    try:
        import accelerate  # noqa: F401  (transformers' Trainer stands on it)
    except ImportError as error:
        raise ConfigError(
            f"training needs accelerate ({error}); install it with: pip install 'atp-patch[train]'."
        ) from error
