"""What vLLM calls in each of its processes as it starts."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.integrations.vllm.settings import VARIABLE, Settings


class Served(NamedTuple):
    """A model class of vLLM that can be pruned.

    Attributes:
        pruned: where the class is that takes its place, as ``module:class``.
        tower: whether methods can read its vision tower.
    """

    pruned: str
    tower: bool


_HERE = "atp_patch.integrations.vllm"
SERVED = {
    "LlavaForConditionalGeneration": Served(f"{_HERE}.llava:PrunedLlava", tower=True),
    "LlavaOnevisionForConditionalGeneration": Served(
        f"{_HERE}.onevision:PrunedOnevision", tower=False
    ),
    "InternVLForConditionalGeneration": Served(f"{_HERE}.internvl:PrunedInternVL", tower=True),
    "Qwen2VLForConditionalGeneration": Served(f"{_HERE}.qwen_vl:PrunedQwen2VL", tower=False),
    "Qwen2_5_VLForConditionalGeneration": Served(f"{_HERE}.qwen_vl:PrunedQwen25VL", tower=False),
    "Qwen3VLForConditionalGeneration": Served(f"{_HERE}.qwen_vl:PrunedQwen3VL", tower=False),
}


def register() -> None:
    """Put pruned classes in the place of vLLM's own, if the environment asks for it.

    A wrong setting ends the process with one line, before anything is loaded.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return
    try:
        settings = Settings.parse(text)
    except ConfigError as error:
        raise SystemExit(f"atp_patch: {error}") from error

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP[name] = _hook(text, settings, SERVED.get(name))
    for name, served in SERVED.items():
        ModelRegistry.register_model(name, served.pruned)


def _hook(text: str, settings: Settings, served: Served | None) -> Any:
    """What vLLM calls with the config of a model before it is loaded."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Hook(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            try:
                check_model(model_config, settings, served)
            except (ConfigError, UnsupportedModelError) as error:
                raise SystemExit(f"atp_patch: {error}") from error
            config = model_config.hf_config
            config.atp_patch = text
            if not model_config.uses_mrope:
                config.mrope_section = [1, 1, 1]  # only says that there are positions of our own

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            try:
                check_engine(vllm_config, settings)
            except ConfigError as error:
                raise SystemExit(f"atp_patch: {error}") from error

    return Hook


def check_model(model_config: Any, settings: Settings, served: Served | None) -> None:
    """Check that a model's pictures can be pruned.

    Args:
        model_config: vLLM's config of the model.
        settings: the method and the budget.
        served: what is known of its class; None for one that cannot be pruned.

    Raises:
        UnsupportedModelError: if the model cannot be pruned, or its tower not read.
        ConfigError: if features of pictures may come ready-made, or videos are pruned.
    """
    config, name = model_config.hf_config, model_config.architecture
    if served is None:
        raise UnsupportedModelError(
            f"{name} cannot be pruned in vLLM; these can: {', '.join(SERVED)}. Unset {VARIABLE} to "
            "serve it as it is."
        )
    if config.model_type in ("llava", "llava_onevision"):
        vision = config.vision_config.model_type
        if not vision.startswith(("clip", "siglip_")):
            raise UnsupportedModelError(
                f"{name} has a vision tower of the type {vision}, whose pictures are no squares; "
                "it is served with CLIP and SigLIP towers."
            )
        if config.vision_feature_select_strategy == "full" and vision.startswith("clip"):
            raise UnsupportedModelError(
                f"this {name} hands its class token to the decoder "
                '(vision_feature_select_strategy="full"), which vLLM cannot prune around.'
            )
    if settings.reads_tower and not served.tower:
        raise UnsupportedModelError(
            f"method={settings.method.name} reads the vision tower, whose attention cannot be read "
            f"or followed to its places in vLLM's {name}; use divprune, prunesid, scope with "
            "alpha=0, random or uniform."
        )
    if model_config.multimodal_config.video_pruning_rate:
        raise ConfigError(
            f"--video-pruning-rate does not go with {VARIABLE}: videos are not served, and its "
            "positions would be added to ours; leave it out."
        )
    if model_config.multimodal_config.enable_mm_embeds:
        raise ConfigError(
            "--enable-mm-embeds lets clients send features, from which nothing can be chosen; "
            f"leave it out, or unset {VARIABLE}."
        )


def check_engine(vllm_config: Any, settings: Settings) -> None:
    """Check that the engine runs in a way in which positions and choices are right.

    Args:
        vllm_config: vLLM's config of everything.
        settings: the method and the budget.

    Raises:
        ConfigError: if it does not; the message names the argument of ``vllm serve``.
    """
    parallel = vllm_config.parallel_config
    reasons = {
        "--pipeline-parallel-size": (
            parallel.pipeline_parallel_size > 1,
            "only the first stage learns which tokens stay",
        ),
        "--enable-dbo": (
            bool(getattr(parallel, "enable_dbo", False)),
            "halves of a batch would take each other's positions",
        ),
        "--speculative-config": (
            vllm_config.speculative_config is not None,
            "the drafting model would not know which tokens stay",
        ),
        "--tensor-parallel-size": (
            settings.reads_tower and parallel.tensor_parallel_size > 1,
            f"method={settings.method.name} needs all heads of the vision tower in one process",
        ),
    }
    for argument, (wrong, reason) in reasons.items():
        if wrong:
            raise ConfigError(f"{argument} does not go with {VARIABLE}: {reason}.")
