"""One short file a family, data first."""

from __future__ import annotations

from typing import Any

from atp_patch.errors import UnsupportedModelError
from atp_patch.families.anyres import ANYRES
from atp_patch.families.base import Family
from atp_patch.families.internvl_chat import INTERNVL_CHAT
from atp_patch.families.llava import LLAVA, VIDEO_LLAVA
from atp_patch.families.molmo2 import MOLMO2
from atp_patch.families.pixtral import MISTRAL3
from atp_patch.families.qwen2_vl import GLM4V, QWEN2_VL, QWEN3_VL
from atp_patch.families.refused import REFUSED
from atp_patch.families.square import (
    FAST_VLM,
    GEMMA3,
    IDEFICS3,
    INTERNVL,
    OVIS2,
    PALIGEMMA,
    PERCEPTION_LM,
)
from atp_patch.families.vila import VILA

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    ANYRES,
    VIDEO_LLAVA,
    QWEN2_VL,
    QWEN3_VL,
    GLM4V,
    INTERNVL,
    PALIGEMMA,
    GEMMA3,
    IDEFICS3,
    MISTRAL3,
    OVIS2,
    FAST_VLM,
    PERCEPTION_LM,
    MOLMO2,
    VILA,
    INTERNVL_CHAT,
)


def supported_families() -> dict[str, tuple[str, ...]]:
    """Family name -> the ``config.model_type`` values that it serves."""
    return {family.name: family.model_types for family in FAMILIES}


def family_of(config: Any) -> Family:
    """The family of a loaded model's config.

    Raises:
        UnsupportedModelError: naming the families that are served.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            family.check(config)
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    why = ""
    if model_type in REFUSED:
        reason, alternative = REFUSED[model_type]
        why = f": {reason}. Instead: {alternative}"
    raise UnsupportedModelError(
        f"models of type {model_type!r} are not supported{why}; supported are: {known}."
    )


__all__ = ["FAMILIES", "Family", "family_of", "supported_families"]
