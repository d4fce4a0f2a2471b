"""What the rooms agree on: errors, arguments, and the plain data that they hand to each other."""

from atp_patch.contract.decision import Decision, Recycled
from atp_patch.contract.layout import Layout, Span, VisualGrid
from atp_patch.contract.model import DecoderShape, GridQuery, Outer
from atp_patch.contract.tower import Merge, Quota, TokenGroups, Tower
from atp_patch.contract.view import View

__all__ = [
    "Decision",
    "DecoderShape",
    "GridQuery",
    "Layout",
    "Merge",
    "Outer",
    "Quota",
    "Recycled",
    "Span",
    "TokenGroups",
    "Tower",
    "View",
    "VisualGrid",
]
