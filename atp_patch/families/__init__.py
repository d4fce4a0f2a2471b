"""The families of models that are served: each is one short file that is data first."""

from __future__ import annotations

from typing import Any

from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.families.anyres import ANYRES, GRANITE4_VISION
from atp_patch.families.base import Family, scaled_layers
from atp_patch.families.gemma4 import GEMMA4
from atp_patch.families.generic import GENERIC
from atp_patch.families.internvl_chat import INTERNVL_CHAT
from atp_patch.families.latents import IDEFICS2
from atp_patch.families.llava import LLAVA, VIDEO_LLAVA
from atp_patch.families.molmo2 import FUYU, MOLMO2
from atp_patch.families.phi4 import PHI4_MULTIMODAL
from atp_patch.families.pixtral import MISTRAL3
from atp_patch.families.qwen2_vl import (
    COSMOS3_EDGE,
    ERNIE4_5_VL,
    GLM4V,
    PADDLEOCR_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_VL,
)
from atp_patch.families.refused import REFUSED
from atp_patch.families.sizes import (
    EXAONE4_5,
    HUNYUAN_VL,
    KIMI_K25,
    LIGHTON_OCR,
    MUSE,
    VIDEO_LLAMA_3,
)
from atp_patch.families.square import (
    AYA_VISION,
    DEEPSEEK_VL,
    FAST_VLM,
    GEMMA3,
    GEMMA3N,
    GOT_OCR2,
    GRANITE_DOCLING,
    IDEFICS3,
    INTERNVL,
    LLAMA4,
    OVIS2,
    PALIGEMMA,
    PERCEPTION_LM,
    STEP3P7,
)
from atp_patch.families.stateful import LFM2_VL, LFM3_VL, MINICPM_V
from atp_patch.families.vila import VILA

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    ANYRES,
    GRANITE4_VISION,
    VIDEO_LLAVA,
    QWEN2_VL,
    QWEN3_VL,
    QWEN3_5,
    GLM4V,
    PADDLEOCR_VL,
    ERNIE4_5_VL,
    COSMOS3_EDGE,
    EXAONE4_5,
    MUSE,
    VIDEO_LLAMA_3,
    HUNYUAN_VL,
    INTERNVL,
    PALIGEMMA,
    GEMMA3,
    GEMMA3N,
    GEMMA4,
    IDEFICS3,
    LLAMA4,
    GRANITE_DOCLING,
    KIMI_K25,
    MISTRAL3,
    LIGHTON_OCR,
    OVIS2,
    FAST_VLM,
    PERCEPTION_LM,
    AYA_VISION,
    GOT_OCR2,
    DEEPSEEK_VL,
    STEP3P7,
    IDEFICS2,
    MOLMO2,
    FUYU,
    PHI4_MULTIMODAL,
    LFM2_VL,
    LFM3_VL,
    MINICPM_V,
    VILA,
    INTERNVL_CHAT,
    GENERIC,
)


def supported_families() -> dict[str, tuple[str, ...]]:
    """Return the ``config.model_type`` values that each family serves, by the family's name."""
    return {family.name: family.model_types for family in FAMILIES}


def family_named(name: str) -> Family:
    """Return the package's own family of this name."""
    return next(family for family in FAMILIES if family.name == name)


def family_of(config: Any, name: str | Family | None = None) -> Family:
    """Return the family of a loaded model's config.

    Args:
        name: the family that the caller asks for. None stands for the one that serves the model's
            type; "generic" is never found by itself; a :class:`Family` is taken as it is.

    Raises:
        ConfigError: where the model is not of the family asked for.
        UnsupportedModelError: where no family serves it; the message names the types served.
    """
    if isinstance(name, Family):
        return _own(config, name)
    if name == GENERIC.name:
        return GENERIC
    family = _found(config)
    if name not in (None, family.name):
        raise ConfigError(
            f"family={name!r}, but the model is of the family {family.name!r}; leave family out, "
            'or give family="generic" and pass visual_mask= with each call.'
        )
    return family


def _own(config: Any, family: Family) -> Family:
    """Check a family of the caller's own against the model, and return it."""
    model_type = getattr(config, "model_type", None)
    if model_type not in family.model_types:
        raise ConfigError(
            f"family={family.name!r} serves models of type {', '.join(family.model_types)}, but "
            f"this one is of type {model_type!r}; add the type to its model_types if it fits."
        )
    family.check(config)
    return family


def _found(config: Any) -> Family:
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
        f"models of type {model_type!r} are not supported{why}; supported are: {known}. "
        "A decoder built of transformers' own layers may be patched with a Family of your own, or "
        'with family="generic".'
    )


__all__ = ["FAMILIES", "Family", "family_of", "scaled_layers", "supported_families"]
