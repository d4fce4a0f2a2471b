"""Fewer visual tokens through the decoder of a Hugging Face vision-language model, in one line.

A public name is loaded when it is first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atp_patch.lazy import lazily
from atp_patch.version import __version__

if TYPE_CHECKING:  # what type checkers and editors read; _HOMES says the same to Python
    from atp_patch import visualize
    from atp_patch.contract import (
        Attention,
        Decision,
        DoorMethod,
        DoorView,
        GridQuery,
        LayerMethod,
        LearnedThresholds,
        LearningStep,
        Merge,
        Method,
        PictureMethod,
        Recycled,
        TokenGroups,
        TowerMethod,
        View,
        VisualGrid,
    )
    from atp_patch.contract.errors import (
        ATPError,
        BudgetError,
        CacheError,
        ConfigError,
        DecisionError,
        HubError,
        InputError,
        NotPatchedError,
        OtherBaseWarning,
        UnsupportedModelError,
        UnsupportedVersionWarning,
        WeightsError,
    )
    from atp_patch.families import Family, scaled_layers, supported_families
    from atp_patch.methods import available_methods
    from atp_patch.patching.api import disabled, last_trace, patch_model, unpatch_model
    from atp_patch.patching.config import PruningConfig
    from atp_patch.patching.saving import push_to_hub, save_pretrained
    from atp_patch.patching.trace import LayerTrace, PruningTrace
    from atp_patch.tools.calibration import Calibration, calibrate
    from atp_patch.tools.parameter_groups import parameter_groups
    from atp_patch.tools.threshold_controls import controlled, threshold_control
    from atp_patch.tools.trained import load_trained
    from atp_patch.tools.visual_cache import VisualCache, compress

__all__ = [
    "ATPError",
    "Attention",
    "BudgetError",
    "CacheError",
    "Calibration",
    "ConfigError",
    "Decision",
    "DecisionError",
    "DoorMethod",
    "DoorView",
    "Family",
    "GridQuery",
    "HubError",
    "InputError",
    "LayerMethod",
    "LayerTrace",
    "LearnedThresholds",
    "LearningStep",
    "Merge",
    "Method",
    "NotPatchedError",
    "OtherBaseWarning",
    "PictureMethod",
    "PruningConfig",
    "PruningTrace",
    "Recycled",
    "TokenGroups",
    "TowerMethod",
    "UnsupportedModelError",
    "UnsupportedVersionWarning",
    "View",
    "VisualCache",
    "VisualGrid",
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
    "visualize",
]

# module -> the public names that it holds
_HOMES = {
    "atp_patch.contract": (
        "Attention",
        "Decision",
        "DoorMethod",
        "DoorView",
        "GridQuery",
        "LayerMethod",
        "LearnedThresholds",
        "LearningStep",
        "Merge",
        "Method",
        "PictureMethod",
        "Recycled",
        "TokenGroups",
        "TowerMethod",
        "View",
        "VisualGrid",
    ),
    "atp_patch.contract.errors": (
        "ATPError",
        "BudgetError",
        "CacheError",
        "ConfigError",
        "DecisionError",
        "HubError",
        "InputError",
        "NotPatchedError",
        "OtherBaseWarning",
        "UnsupportedModelError",
        "UnsupportedVersionWarning",
        "WeightsError",
    ),
    "atp_patch.families": ("Family", "scaled_layers", "supported_families"),
    "atp_patch.methods": ("available_methods",),
    "atp_patch.patching.config": ("PruningConfig",),
    "atp_patch.patching.api": ("disabled", "last_trace", "patch_model", "unpatch_model"),
    "atp_patch.patching.saving": ("push_to_hub", "save_pretrained"),
    "atp_patch.patching.trace": ("LayerTrace", "PruningTrace"),
    "atp_patch.tools.calibration": ("Calibration", "calibrate"),
    "atp_patch.tools.parameter_groups": ("parameter_groups",),
    "atp_patch.tools.threshold_controls": ("controlled", "threshold_control"),
    "atp_patch.tools.trained": ("load_trained",),
    "atp_patch.tools.visual_cache": ("VisualCache", "compress"),
}
__getattr__, __dir__ = lazily(__name__, _HOMES, modules=("visualize",))
