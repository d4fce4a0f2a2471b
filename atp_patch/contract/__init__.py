"""What all other rooms share: errors, arguments, and the plain data that they exchange."""

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
