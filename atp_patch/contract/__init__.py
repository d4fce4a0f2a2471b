"""What all other rooms share: errors, arguments, and the plain data that they exchange.

A name is loaded when it is first used: errors and arguments need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atp_patch.lazy import lazily

if TYPE_CHECKING:  # what type checkers and editors read; _HOMES says the same to Python
    from atp_patch.contract.decision import Decision, Recycled
    from atp_patch.contract.layout import Layout, Span, VisualGrid
    from atp_patch.contract.mask import AttentionMask
    from atp_patch.contract.method import (
        DoorMethod,
        LayerMethod,
        Method,
        PictureMethod,
        TowerMethod,
    )
    from atp_patch.contract.method_learning import LearnedThresholds, LearningStep, ModuleSpec
    from atp_patch.contract.model import DecoderShape, GridQuery, Outer
    from atp_patch.contract.tower import (
        Merge,
        Quota,
        TextEncoder,
        TokenGroups,
        Tower,
        TowerTokens,
    )
    from atp_patch.contract.view import Attention, DoorView, TokenView, View

__all__ = [
    "Attention",
    "AttentionMask",
    "Decision",
    "DecoderShape",
    "DoorMethod",
    "DoorView",
    "GridQuery",
    "LayerMethod",
    "Layout",
    "LearnedThresholds",
    "LearningStep",
    "Merge",
    "Method",
    "ModuleSpec",
    "Outer",
    "PictureMethod",
    "Quota",
    "Recycled",
    "Span",
    "TextEncoder",
    "TokenGroups",
    "TokenView",
    "Tower",
    "TowerMethod",
    "TowerTokens",
    "View",
    "VisualGrid",
]

# module -> the public names that it holds
_HOMES = {
    "atp_patch.contract.decision": (
        "Decision",
        "Recycled",
    ),
    "atp_patch.contract.layout": (
        "Layout",
        "Span",
        "VisualGrid",
    ),
    "atp_patch.contract.mask": ("AttentionMask",),
    "atp_patch.contract.method": (
        "DoorMethod",
        "LayerMethod",
        "Method",
        "PictureMethod",
        "TowerMethod",
    ),
    "atp_patch.contract.method_learning": (
        "LearnedThresholds",
        "LearningStep",
        "ModuleSpec",
    ),
    "atp_patch.contract.model": (
        "DecoderShape",
        "GridQuery",
        "Outer",
    ),
    "atp_patch.contract.tower": (
        "Merge",
        "Quota",
        "TextEncoder",
        "TokenGroups",
        "Tower",
        "TowerTokens",
    ),
    "atp_patch.contract.view": (
        "Attention",
        "DoorView",
        "TokenView",
        "View",
    ),
}
__getattr__, __dir__ = lazily(__name__, _HOMES)
