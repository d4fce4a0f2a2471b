"""Finding the device, the model and the inputs that a command line names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers  # which loads a class of its own when it is used
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._validators import validate_repo_id
from PIL import Image
from torch import nn
from transformers.utils import logging

from atp_patch.builtin import NAMES, load_builtin
from atp_patch.contract.errors import ATPError, ConfigError, InputError, UnsupportedModelError
from atp_patch.contract.errors import first_line as first_line  # used by the commands too
from atp_patch.families import family_of
from atp_patch.tools.command_line import is_out_of_memory
from atp_patch.tools.files import parse_json

# By architecture of another package, the name of its layout for `python -m atp_patch.convert`.
FOREIGN = {
    "LlavaLlamaForCausalLM": "llava",
    "LlavaMistralForCausalLM": "llava",
    "LlavaLlamaModel": "vila",
    "InternVLChatModel": "internvl",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or a GPU if there is one, or the CPU.

    Raises:
        ConfigError: for a name torch does not know, or a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # the device "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name} cannot be used here ({first_line(error)}); give cpu, or cuda where "
            "there is a GPU."
        ) from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the named dtype, or the usual one of the device: float32 on a CPU, and bfloat16
    elsewhere.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, check: Callable[[nn.Module], object]
) -> tuple[Any, Any]:
    """Load the built-in model that commands call by this name, or else a checkpoint.

    Arguments and errors are those of :func:`load_checkpoint`; a built-in model needs no check.
    """
    if name in NAMES:
        return load_builtin(NAMES[name], dtype=dtype, device=device)
    return load_checkpoint(name, device, dtype, check)


def load_checkpoint(
    name: str, device: torch.device, dtype: torch.dtype, check: Callable[[nn.Module], object]
) -> tuple[Any, Any]:
    """Load a supported vision-language model and its processor.

    Args:
        name: a folder or a Hub id.
        device: where the model goes.
        dtype: the dtype of its weights.
        check: is called with the model without its weights first, so that a wrong argument is found
            before gigabytes are read.

    Returns:
        the model and its processor.

    Raises:
        ConfigError: where the name leads to no checkpoint, or to a broken one.
        UnsupportedModelError: for an architecture that is not supported.
    """
    _check_name(name)
    with _explained(name, "has no configuration that can be read", "check --model and the network"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    _check_layout(name, config.architectures)
    family_of(config)
    with torch.device("meta"):
        with _explained(name, "cannot be built", "install what its configuration asks for"):
            empty = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
        check(empty)
    with _explained(name, "has no processor", "add the files its save_pretrained writes"):
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if getattr(processor, "chat_template", None) is None:
        raise UnsupportedModelError(
            f"the processor of {name} has no chat template to put the question in; add "
            "chat_template.jinja to the folder."
        )
    kind = str(dtype).removeprefix("torch.")
    print(f"Loading {name} to {device} as {kind} ...", file=sys.stderr)
    with _explained(name, "cannot be loaded", "check its weight files"):
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), processor


def encode(
    processor: Any,
    image: Image.Image,
    question: str,
    model: Any,
    earlier: Sequence[tuple[str, str]] = (),
) -> transformers.BatchFeature:
    """Return the model's inputs for one question on one image.

    Args:
        processor: the model's processor.
        image: the image.
        question: the question.
        model: the model, for its device and dtype.
        earlier: earlier questions about the image and their answers.

    Raises:
        InputError: where the processor refuses the image.
    """
    chat: list[dict[str, Any]] = []
    for asked, answered in [*earlier, (question, None)]:
        chat.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        if answered is not None:
            answer = [{"type": "text", "text": answered}]
            chat.append({"role": "assistant", "content": answer})
    chat[0]["content"].insert(0, {"type": "image", "image": image})
    try:
        inputs = processor.apply_chat_template(
            chat,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except ValueError as error:
        raise InputError(f"the model's processor refuses the image: {first_line(error)}") from error
    return inputs.to(model.device, model.dtype)


@contextmanager
def quiet_transformers(progress: bool) -> Iterator[None]:
    """Silence transformers on stderr inside this context.

    Args:
        progress: whether its progress bars are shown all the same.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.CRITICAL)  # otherwise it reports each retry
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def _check_name(name: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{name} is not a model folder: it has no config.json. Give a folder that "
                "save_pretrained wrote, or a Hub id."
            )
        with _explained(name, "has no configuration that can be read", "check --model"):
            table = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        _check_layout(name, table.get("architectures") if isinstance(table, dict) else None)
        return
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ConfigError(
            f"there is no model folder {name}, and it is no Hub id; check --model."
        ) from error
    if folder.exists():
        raise ConfigError(f"{name} is a file; give a model folder or a Hub id.")


def _check_layout(name: str, architectures: Any) -> None:
    """Refuse a checkpoint of another package, which transformers would read as random weights."""
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    layout = FOREIGN.get(first) if isinstance(first, str) else None
    if layout is not None:
        raise UnsupportedModelError(
            f"{name} is not in transformers' own layout; convert it with "
            f"python -m atp_patch.convert {layout} FOLDER OUT."
        )


@contextmanager
def _explained(name: str, what: str, mend: str) -> Iterator[None]:
    """Report an error of transformers' readers as one about the checkpoint.

    For a broken file they raise errors of every kind, such as plain ``Exception`` from tokenizers,
    and ``ZeroDivisionError`` from a configuration without heads.

    Args:
        name: the name of the checkpoint.
        what: what the error means for the checkpoint.
        mend: what the user can do.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{name}: {first_line(error)} Install it.") from error
    except Exception as error:
        if isinstance(error, ATPError) or is_out_of_memory(error):
            raise
        problem = first_line(error).rstrip(".")
        if not isinstance(error, (OSError, ValueError)):  # other messages need their type's name
            problem = f"{type(error).__name__}: {problem}"
        raise ConfigError(f"{name} {what} ({problem}); {mend}.") from error
