"""Loading the built-in models, their prompts, and scenes of the size that they are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import transformers  # it loads each of its classes when the class is used

from atp_patch.builtin import tokens
from atp_patch.builtin.dynamic import tokens as dynamic_tokens
from atp_patch.builtin.dynamic.sizes import at_size, scene_size
from atp_patch.builtin.names import DYNAMIC, LLAVA, NAMES
from atp_patch.builtin.scenes import Scene, SceneConfig
from atp_patch.contract.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


def builtin_path(name: str = LLAVA) -> Path:
    """Return the folder with the weights, configuration, tokenizer, processor and card.

    Raises:
        ConfigError: if there is no built-in model of that name.
    """
    here = Path(__file__).resolve().parent
    return (here / DYNAMIC if _known(name) == DYNAMIC else here) / "weights"


@overload
def load_builtin(
    name: Literal["llava"] = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str = ...,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]: ...
@overload
def load_builtin(
    name: str, dtype: torch.dtype | None = ..., device: torch.device | str = ...
) -> tuple[Any, Any]: ...
def load_builtin(
    name: str = LLAVA, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """Load a built-in model, in evaluation mode, and its processor.

    Args:
        name: "llava" or "dynamic".
        dtype: dtype of the parameters, by default float32. They are stored in bfloat16.
        device: the device of the model.

    Raises:
        ConfigError: if there is no built-in model of that name.
    """
    folder = builtin_path(name)
    kind: Any = transformers.LlavaForConditionalGeneration
    reader: Any = transformers.AutoProcessor
    if name == DYNAMIC:
        from atp_patch.builtin.dynamic.processing import SizedProcessor

        kind, reader = transformers.Qwen3VLForConditionalGeneration, SizedProcessor
    model = kind.from_pretrained(folder, dtype=dtype or torch.float32)
    # Its name, which adapters record, instead of a path on this computer.
    model.config._name_or_path = next(said for said, known in NAMES.items() if known == name)
    return model.to(device).eval(), reader.from_pretrained(folder)


def prompt(question: str, name: str = LLAVA) -> str:
    """Return the prompt of a question about one image, as the model's chat template writes it."""
    return (dynamic_tokens if _known(name) == DYNAMIC else tokens).prompt(question)


def as_shown(scene: Scene, name: str = LLAVA, config: SceneConfig | None = None) -> Scene:
    """Return a scene with a picture of the size that a model is shown, and the same questions.

    Args:
        scene: a scene from `make_scene`.
        name: name of the model; for "llava" the scene is not changed.
        config: the configuration with which the scene was made.
    """
    if _known(name) == LLAVA:
        return scene
    size = scene_size(scene.split, scene.index)
    return at_size(scene, size, (config or SceneConfig()).noise)


def _known(name: str) -> str:
    if name not in NAMES.values():
        raise ConfigError(f"no built-in model {name!r}; there are {', '.join(NAMES.values())}.")
    return name
