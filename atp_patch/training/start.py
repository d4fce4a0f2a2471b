"""What a training starts from: its data, and the model with the patch whose thresholds learn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from atp_patch.builtin import LLAVA, NAMES
from atp_patch.contract.errors import ConfigError
from atp_patch.patching.api import patch_model, require_patch
from atp_patch.tools.loading import load_model
from atp_patch.tools.trained import find_trained
from atp_patch.training.records import LlavaFile, Scenes, Source
from atp_patch.training.settings import BUILTIN, Settings

SCENES = 20_000


def source_of(settings: Settings) -> Source:
    """Make the source of the samples that the settings name."""
    if settings.data == BUILTIN:
        return Scenes(settings.samples or SCENES, NAMES.get(settings.model, LLAVA))
    file = Path(settings.data)
    images = file.parent if settings.images is None else Path(settings.images)
    return LlavaFile(
        file,
        images,
        samples=settings.samples,
        text_only=settings.text_only,
        max_image_pixels=settings.max_image_pixels,
    )


def load(settings: Settings, token: str | None = None) -> tuple[Any, Any]:
    """Return the model on the CPU with its processor. It is in bfloat16 only where no optimizer
    needs its weights more exactly.

    Args:
        settings: the settings of the training.
        token: the token to read an adapter from the Hub with.
    """
    half = settings.dtype == "bfloat16" and (settings.freeze_lm or settings.deepspeed is not None)
    dtype = torch.bfloat16 if half else torch.float32
    check = partial(patch, settings=settings, token=token)
    return load_model(settings.model, torch.device("cpu"), dtype, check=check)


def patch(model: Any, settings: Settings, token: str | None = None) -> None:
    """Patch the model with an adapter, or with thresholds that have not learned yet.

    Args:
        model: the model, with or without its weights.
        settings: the settings of the training.
        token: the token to read an adapter from the Hub with.

    Raises:
        ConfigError: where the adapter or an option does not go with training.
    """
    if settings.adapter is not None:
        found = find_trained(settings.adapter, revision=settings.revision, token=token)
        if found.lora is not None:
            raise ConfigError(
                f"adapter: LoRA learned beside {settings.adapter} and would be left out. Add it to "
                "a model's weights (load_trained), unpatch and save that; give its folder as model "
                f"and a copy of {found.adapter} as adapter."
            )
        patch_model(model, weights=found.adapter)
        if require_patch(model).learned_module is None:
            raise ConfigError(f"adapter: {settings.adapter} has no learned thresholds to train.")
        return
    if settings.options.get("thresholds", "learned") != "learned":
        raise ConfigError("options: training is for thresholds that are learned; leave it out.")
    options = {**settings.options, "thresholds": "learned", "rope_2d": settings.rope_2d}
    patch_model(model, settings.layers, "atp", target_tokens=settings.target_tokens, **options)
