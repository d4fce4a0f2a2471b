"""The settings of a training: one frozen dataclass, filled from a YAML file and flags."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from atp_patch.builtin import NAMES
from atp_patch.contract.errors import ConfigError
from atp_patch.tools.arguments import DTYPES, MAX_IMAGE_PIXELS, check_text

BUILTIN = "builtin"
SCHEDULES = ("cosine", "linear", "constant_with_warmup")


GROUPS = ("model", "data", "pruning", "what learns", "optimizer", "files")


def _says(group: str, default: Any, text: str) -> Any:
    """Return a setting with its default, and the group and text in which ``--help`` shows it."""
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about a training; ``--help`` explains each setting.

    Raises:
        ConfigError: where a value is out of range, or two settings exclude each other.
    """

    model: str = _says("model", BUILTIN, f"{', '.join(NAMES)}, or a folder or Hub id")
    data: str = _says("data", BUILTIN, "builtin, or a .json or .jsonl file in LLaVA's format")
    images: str | None = _says("data", None, "folder of the images (default: the data file's)")
    samples: int | None = _says(
        "data", None, "number of samples, from the first on (default: all; builtin: 20000)"
    )
    out: str = _says("files", "training", "folder of checkpoints and of what is learned")
    layers: tuple[int, ...] | None = _says("pruning", None, "default: 4,14,24 of 32, in proportion")
    target_tokens: float | None = _says(
        "pruning", None, "visual tokens to average (default: a quarter)"
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"group": "pruning", "help": "options of the method atp, NAME=VALUE"},
    )
    adapter: str | None = _says(
        "pruning", None, "start from an adapter with learned thresholds: its folder or Hub id"
    )
    revision: str | None = _says(
        "pruning", None, "a branch, tag or commit of the adapter's Hub repository"
    )
    freeze_lm: bool = _says("what learns", True, "train the threshold heads alone")
    lora_rank: int = _says("what learns", 0, "with freeze_lm: LoRA of this rank on the decoder")
    lora_alpha: float = _says("what learns", 32.0, "LoRA's scale")
    rope_2d: bool = _says(
        "pruning",
        False,
        "rotary positions of visual tokens by row and column; the decoder must learn",
    )
    distill: float = _says("what learns", 0.0, "weight of the KL divergence to the unpruned model")
    lr: float = _says("optimizer", 2e-5, "learning rate of the model or its LoRA")
    atp_lr: float = _says("optimizer", 1e-4, "learning rate of the heads")
    atp_bias_lr: float | None = _says(
        "optimizer", None, "of the thresholds' own biases (default: atp_lr)"
    )
    batch_size: int = _says("optimizer", 8, "samples an optimizer step, over all devices")
    micro_batch_size: int | None = _says(
        "optimizer", None, "samples a pass and device (default: all)"
    )
    epochs: float = _says("optimizer", 1.0, "passes over the data")
    steps: int | None = _says("optimizer", None, "optimizer steps, in place of epochs")
    schedule: str = _says("optimizer", "cosine", ", ".join(SCHEDULES))
    warmup: float = _says("optimizer", 0.03, "share of the steps in which learning rates rise")
    weight_decay: float = _says("optimizer", 0.0, "of the model, not of the heads")
    betas: tuple[float, ...] = _says("optimizer", (0.9, 0.999), "of AdamW")
    clip: float = _says("optimizer", 1.0, "greatest norm of the gradient")
    calibrate: int = _says(
        "pruning", 64, "samples on which the thresholds are set to the target at the end; 0: none"
    )
    max_length: int | None = _says("data", None, "tokens of a sample; text beyond is cut")
    max_image_pixels: int = _says("data", MAX_IMAGE_PIXELS, "larger images are bad samples")
    text_only: bool = _says("data", False, "take conversations without an image too")
    skip_bad: bool = _says("data", False, "leave bad samples out and count them")
    dtype: str = _says("model", "float32", "float32, or bfloat16 (autocast)")
    device: str | None = _says("model", None, "cpu or cuda (default: cuda if there is one)")
    gradient_checkpointing: bool = _says("model", False, "less memory, more time")
    deepspeed: str | None = _says("model", None, "a DeepSpeed configuration")
    workers: int = _says("data", 0, "processes that prepare data")
    seed: int = _says("optimizer", 0, "of the heads' start and the data's order")
    log_every: int = _says("files", 10, "steps between lines of progress")
    save_every: int = _says("files", 100, "steps between checkpoints")
    keep: int = _says("files", 2, "checkpoints kept")

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "save_every", "keep", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least 1.")
        for name in ("micro_batch_size", "steps", "samples", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} must be at least 1.")
        for entry in fields(self):
            value = getattr(self, entry.name)
            # No limit to the gradient's norm is a setting that makes sense.
            if isinstance(value, float) and math.isinf(value) and entry.name != "clip":
                raise ConfigError(f"{entry.name}: {value} must be finite.")
        for name in ("lr", "atp_lr", "atp_bias_lr", "clip", "epochs", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: {value} must be above 0.")
        for name in (
            "distill",
            "weight_decay",
            "workers",
            "lora_rank",
            "warmup",
            "calibrate",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: {getattr(self, name)} must not be negative.")
        if self.seed >= 2**32:
            raise ConfigError(f"seed: {self.seed} must be below 2**32.")
        if self.warmup >= 1:
            raise ConfigError(f"warmup: {self.warmup} must be a share below 1.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"betas: {list(self.betas)} must be two numbers, each from 0 to below 1."
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule: {self.schedule!r} is none of {', '.join(SCHEDULES)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f"dtype: {self.dtype!r} is not float32 or bfloat16 (of {', '.join(DTYPES)}, these "
                "train without a loss scale)."
            )
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device: {self.device!r} is not cpu or cuda.")
        if self.lora_rank and not self.freeze_lm:
            raise ConfigError("lora_rank is for a frozen language model: set freeze_lm: true.")
        if self.rope_2d and self.freeze_lm and not self.lora_rank:
            raise ConfigError(
                "rope_2d changes what the decoder has learned, and it is frozen: set freeze_lm: "
                "false, or lora_rank."
            )
        if self.text_only and self.freeze_lm and not self.lora_rank:
            raise ConfigError(
                "text_only: heads learn nothing from text alone; leave it out, or set "
                "freeze_lm: false."
            )
        for name in ("layers", "target_tokens", "rope_2d", "method", "weights", "model"):
            if name in self.options:
                own = "is a setting of its own" if hasattr(self, name) else "is not for a training"
                raise ConfigError(f"options: {name} {own}; take it out of options.")
        if self.revision is not None and self.adapter is None:
            raise ConfigError("revision: it goes with adapter (--weights); give both.")
        if self.adapter is not None and (
            self.layers or self.options or self.target_tokens or self.rope_2d
        ):
            raise ConfigError(
                "adapter has layers, target_tokens, options and rope_2d in it; leave them out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, which YAML and JSON can hold."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def read_settings(file: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Read the settings from a YAML file and flags.

    A flag replaces the file's value. ``options`` are put together: each option that a flag gives
    replaces the file's option of that name.

    Raises:
        ConfigError: naming the file and the key that is unknown or has a wrong value.
    """
    given = {} if file is None else _read_yaml(file)
    where = "flags" if file is None else str(file)
    options = given.get("options") or {}
    if not isinstance(options, dict):
        raise ConfigError(f"{where}: options must be a mapping of names to values.")
    given |= flags
    given["options"] = {**options, **flags.get("options", {})}
    hints = get_type_hints(Settings)
    unknown = [name for name in given if name not in {entry.name for entry in fields(Settings)}]
    if unknown:
        raise ConfigError(
            f"{where}: there is no setting {', '.join(map(repr, unknown))}; --help lists them."
        )
    return Settings(**{name: convert(name, value, hints[name]) for name, value in given.items()})


def convert(name: str, value: Any, kind: Any) -> Any:
    """Turn a value from YAML or a flag into the type of its setting.

    "none" becomes None where the setting may be None. YAML reads ``2e-5`` as a word, so words are
    tried as numbers too.

    Raises:
        ConfigError: naming the setting.
    """
    if get_origin(kind) in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    try:
        if get_origin(kind) is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(convert(name, part, get_args(kind)[0]) for part in parts)
        if get_origin(kind) is dict:
            return {str(key): _option(str(key), entry) for key, entry in value.items()}
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError("true or false")
            return value
        if kind is int and not isinstance(value, bool):
            number = int(float(value))
            if float(value) == number and abs(number) <= sys.maxsize:
                return number
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (str, Path)):
            check_text(str(value), name)
            return str(value)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError):
        pass
    wanted = getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{name}: {value!r} is not of the kind {wanted}; mend it.")


def _option(name: str, value: Any) -> Any:
    """Return an option as YAML reads it, except that lists become tuples, and words such as 1e6
    become the numbers that they are.
    """
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not all(part is None or isinstance(part, (bool, int, float, str)) for part in parts):
        raise ConfigError(f"options: {name} is neither a plain value nor a list of such.")
    if isinstance(value, list):
        return tuple(value)
    try:
        found = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    if isinstance(found, float) and not math.isfinite(found):
        raise ConfigError(f"options: {name} must be finite, not {found}.")
    return found


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give a YAML file.") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for dates and long numbers
        raise ConfigError(f"{file} is not YAML ({error}); mend it.") from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be read; mend it.") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{file} holds no settings; write lines such as: steps: 300")
    return given
