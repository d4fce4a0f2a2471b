"""The folder of a training: what lies in it, and from which checkpoint the training goes on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from atp_patch.contract.errors import ConfigError
from atp_patch.patching.adapter_card import Beside
from atp_patch.tools.files import check_folder, parse_json
from atp_patch.training.settings import Settings

SETTINGS_FILE = "settings.json"
ADAPTER = "adapter"
MODEL: Beside = "model"
LORA: Beside = "lora"
# Settings that may change when a training is resumed.
_FREE = ("out", "device", "workers", "log_every", "save_every", "keep", "skip_bad", "calibrate")


def checkpoint_of(settings: Settings, resume: bool) -> str | None:
    """Return the newest checkpoint of the same settings; None where nothing is to be resumed.

    Raises:
        ConfigError: where the folder does not go with ``resume``, or the training is finished.
    """
    out = Path(settings.out)
    check_folder(out, "out")
    newest = _newest_checkpoint(out)
    if not resume:
        earlier = [name for name in (ADAPTER, LORA, MODEL) if (out / name).exists()]
        if newest is None and earlier:
            raise ConfigError(
                f"{out} holds the {earlier[0]} of an earlier training; give another --out."
            )
        if newest is not None:
            raise ConfigError(
                f"{out} holds {Path(newest).name} of an earlier training; --resume goes on with "
                "it, another --out starts anew."
            )
        return None
    if newest is None:
        raise ConfigError(f"there is no checkpoint in {out} to go on from; leave --resume out.")
    file = out / SETTINGS_FILE
    try:
        before = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); train anew in another out.") from error
    now = settings.to_dict()
    # A checkpoint older than a setting was trained as that setting's default says.
    before = {**Settings().to_dict(), **before}
    changed = [
        f"{entry.name} ({before[entry.name]!r}, now {now[entry.name]!r})"
        for entry in fields(Settings)
        if entry.name not in _FREE and before[entry.name] != now[entry.name]
    ]
    if changed:
        raise ConfigError(
            f"{out} was trained with other settings: {', '.join(changed)}; go on with the same, "
            "or train anew in another out."
        )
    if (out / ADAPTER).exists():
        raise ConfigError(
            f"the training in {out} is finished, and its adapter is {out / ADAPTER}: nothing was "
            "changed. Leave --resume out and give another --out to train anew."
        )
    return newest


def _newest_checkpoint(out: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, which its state shows: it comes
    last.
    """
    states = out.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    folders = [state.parent for state in states if state.parent.name.split("-")[-1].isdecimal()]
    folders = [folder for folder in folders if _state(folder) is not None]
    return str(max(folders, key=lambda f: int(f.name.split("-")[-1]))) if folders else None


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """Return what the trainer wrote last into a checkpoint; None where it was broken off."""
    try:
        state = parse_json((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def at_its_end(checkpoint: Path) -> bool:
    """Return whether no step is left after a checkpoint, so that only saving was broken off."""
    state = _state(checkpoint)
    return state is not None and bool(state["global_step"] >= state["max_steps"])
