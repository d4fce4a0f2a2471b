"""The small real vision-language models that ship with the package, and their generated scenes.

    from atp_patch.builtin import load_builtin, make_scene, prompt

    model, processor = load_builtin()
    scene = make_scene("test", 0)
    inputs = processor(images=scene.image, text=prompt("How many red shapes are there?"),
                       return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)

"llava" is meant where no name is given: 576 visual tokens, 32 decoder layers. The other one,
"dynamic", is a Qwen3-VL that is shown pictures of several sizes, 144 to 225 visual tokens, with 2D
rotary positions in 8 decoder layers:

    model, processor = load_builtin("dynamic")
    inputs = processor(images=as_shown(scene, "dynamic").image, return_tensors="pt",
                       text=prompt("How many red shapes are there?", "dynamic"))

The folders `builtin_path(name)` also load through `AutoModelForImageTextToText` and
`AutoProcessor`, which needs torchvision for "dynamic".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import transformers  # which loads a class of its own when it is used

from atp_patch.builtin import tokens
from atp_patch.builtin.dynamic import tokens as dynamic_tokens
from atp_patch.builtin.dynamic.sizes import at_size, scene_size
from atp_patch.builtin.scenes import (
    SPLITS,
    Question,
    Scene,
    SceneConfig,
    SceneObject,
    Sign,
    make_scene,
)
from atp_patch.builtin.vocabulary import TASKS
from atp_patch.contract.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = [
    "DYNAMIC",
    "LLAVA",
    "NAMES",
    "SPLITS",
    "TASKS",
    "Question",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "Sign",
    "as_shown",
    "builtin_path",
    "load_builtin",
    "make_scene",
    "prompt",
]


LLAVA, DYNAMIC = "llava", "dynamic"
NAMES: dict[str, str] = {"builtin": LLAVA, "builtin-dynamic": DYNAMIC}
"""What commands call the built-in models -> their names."""


def builtin_path(name: str = LLAVA) -> Path:
    """Folder with the weights, configuration, tokenizer, processor and card.

    Raises:
        ConfigError: there is no built-in model of that name.
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
    """A built-in model, in evaluation mode, and its processor.

    Args:
        name: "llava" or "dynamic".
        dtype: of the parameters; float32 if None. They are stored in bfloat16.
        device: where the model goes.

    Raises:
        ConfigError: there is no built-in model of that name.
    """
    folder = builtin_path(name)
    kind: Any = transformers.LlavaForConditionalGeneration
    reader: Any = transformers.AutoProcessor
    if name == DYNAMIC:
        from atp_patch.builtin.dynamic.processing import SizedProcessor

        kind, reader = transformers.Qwen3VLForConditionalGeneration, SizedProcessor
    model = kind.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.to(device).eval(), reader.from_pretrained(folder)


def prompt(question: str, name: str = LLAVA) -> str:
    """The prompt of one question about one image, as the model's chat template writes it."""
    return (dynamic_tokens if _known(name) == DYNAMIC else tokens).prompt(question)


def as_shown(scene: Scene, name: str = LLAVA, config: SceneConfig | None = None) -> Scene:
    """The scene as large as a model is shown it: the same questions, its own picture.

    Args:
        scene: from `make_scene`.
        name: of the model; for "llava" every scene is as it is.
        config: with which the scene was made.
    """
    if _known(name) == LLAVA:
        return scene
    size = scene_size(scene.split, scene.index)
    return at_size(scene, size, (config or SceneConfig()).noise)


def _known(name: str) -> str:
    if name not in NAMES.values():
        raise ConfigError(f"no built-in model {name!r}; there are {', '.join(NAMES.values())}.")
    return name
