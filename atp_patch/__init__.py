"""Fewer visual tokens through the decoder of a Hugging Face vision-language model, in one line."""

from atp_patch.contract import Decision, View
from atp_patch.contract.errors import (
    ATPError,
    BudgetError,
    CacheError,
    ConfigError,
    InputError,
    NotPatchedError,
    UnsupportedModelError,
    WeightsError,
)
from atp_patch.contract.version import __version__
from atp_patch.families import supported_families
from atp_patch.methods import Method, available_methods
from atp_patch.patching.config import PruningConfig, scaled_layers
from atp_patch.patching.patch import disabled, last_trace, patch_model, unpatch_model
from atp_patch.patching.saving import push_to_hub, save_pretrained
from atp_patch.patching.trace import LayerTrace, PruningTrace
from atp_patch.tools.calibration import Calibration, calibrate, controlled, threshold_control
from atp_patch.tools.parameter_groups import parameter_groups
from atp_patch.tools.trained import load_trained
from atp_patch.tools.visual_cache import VisualCache, compress

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
    "__version__",
    "available_methods",
    "calibrate",
    "compress",
    "controlled",
    "disabled",
    "last_trace",
    "load_trained",
    "parameter_groups",
    "patch_model",
    "push_to_hub",
    "save_pretrained",
    "scaled_layers",
    "supported_families",
    "threshold_control",
    "unpatch_model",
]
