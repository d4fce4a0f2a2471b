"""Fewer visual tokens through the decoder of a Hugging Face vision-language model, in one line."""

from atp_patch.calibration import Calibration, calibrate, controlled, threshold_control
from atp_patch.config import PruningConfig, scaled_layers
from atp_patch.errors import (
    ATPError,
    BudgetError,
    CacheError,
    ConfigError,
    InputError,
    NotPatchedError,
    UnsupportedModelError,
    WeightsError,
)
from atp_patch.families import supported_families
from atp_patch.methods import Method, available_methods
from atp_patch.patch import disabled, last_trace, patch_model, unpatch_model
from atp_patch.saving import push_to_hub, save_pretrained
from atp_patch.trace import LayerTrace, PruningTrace
from atp_patch.training.learn import parameter_groups
from atp_patch.types import Decision, View
from atp_patch.visual_cache import VisualCache, compress

__version__ = "0.1.0"

__all__ = [
    "ATPError",
    "BudgetError",
    "CacheError",
    "Calibration",
    "ConfigError",
    "Decision",
    "InputError",
    "LayerTrace",
    "Method",
    "NotPatchedError",
    "PruningConfig",
    "PruningTrace",
    "UnsupportedModelError",
    "View",
    "VisualCache",
    "WeightsError",
    "available_methods",
    "calibrate",
    "compress",
    "controlled",
    "disabled",
    "last_trace",
    "parameter_groups",
    "patch_model",
    "push_to_hub",
    "save_pretrained",
    "scaled_layers",
    "supported_families",
    "threshold_control",
    "unpatch_model",
]
