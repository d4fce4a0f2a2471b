"""The small real vision-language models that ship with the package, and their generated scenes.

    from atp_patch.builtin import load_builtin, make_scene, prompt

    model, processor = load_builtin()
    scene = make_scene("test", 0)
    inputs = processor(images=scene.image, text=prompt("How many red shapes are there?"),
                       return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)

The default model, "llava", has 576 visual tokens and 32 decoder layers. The other one, "dynamic",
is a Qwen3-VL with 2D rotary positions and 8 decoder layers; it reads pictures of several sizes,
which have 144 to 225 visual tokens:

    model, processor = load_builtin("dynamic")
    inputs = processor(images=as_shown(scene, "dynamic").image, return_tensors="pt",
                       text=prompt("How many red shapes are there?", "dynamic"))

The folders `builtin_path(name)` also load through `AutoModelForImageTextToText` and
`AutoProcessor`, which needs torchvision for "dynamic".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atp_patch.lazy import lazily

if TYPE_CHECKING:  # what type checkers and editors read; _HOMES says the same to Python
    from atp_patch.builtin.models import as_shown, builtin_path, load_builtin, prompt
    from atp_patch.builtin.names import DYNAMIC, LLAVA, NAMES
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

# module -> the public names that it holds
_HOMES = {
    "atp_patch.builtin.models": ("as_shown", "builtin_path", "load_builtin", "prompt"),
    "atp_patch.builtin.names": ("DYNAMIC", "LLAVA", "NAMES"),
    "atp_patch.builtin.scenes": (
        "SPLITS",
        "Question",
        "Scene",
        "SceneConfig",
        "SceneObject",
        "Sign",
        "make_scene",
    ),
    "atp_patch.builtin.vocabulary": ("TASKS",),
}
__getattr__, __dir__ = lazily(__name__, _HOMES)
