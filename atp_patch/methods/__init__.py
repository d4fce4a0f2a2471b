"""The methods, one in each file: each chooses from what it sees which tokens to keep."""

from __future__ import annotations

import warnings
from typing import Any

from atp_patch.contract import (
    DoorMethod,
    LayerMethod,
    Method,
    ModuleSpec,
    PictureMethod,
    TowerMethod,
)
from atp_patch.methods.atp import ATP
from atp_patch.methods.base import attention_paid, keep_best, minimum_counts
from atp_patch.methods.cdpruner import CDPruner
from atp_patch.methods.divprune import DivPrune
from atp_patch.methods.downsample import Downsample
from atp_patch.methods.fastervlm import FasterVLM
from atp_patch.methods.fastv import FastV
from atp_patch.methods.fixed import Fixed
from atp_patch.methods.prumerge import PruMerge, PruMergePlus
from atp_patch.methods.registry import (
    METHODS,
    MethodSet,
    available_methods,
    make_method,
    make_methods,
    method_class,
    untrained_methods,
)
from atp_patch.methods.scope import SCOPE
from atp_patch.methods.sparsevlm import SparseVLM
from atp_patch.methods.visionzip import VisionZip
from atp_patch.methods.voco import VoCo

__all__ = [
    "ATP",
    "METHODS",
    "SCOPE",
    "CDPruner",
    "DivPrune",
    "DoorMethod",
    "Downsample",
    "FastV",
    "FasterVLM",
    "Fixed",
    "LayerMethod",
    "Method",
    "MethodSet",
    "ModuleSpec",
    "PictureMethod",
    "PruMerge",
    "PruMergePlus",
    "SparseVLM",
    "TowerMethod",
    "VisionZip",
    "VoCo",
    "attention_paid",
    "available_methods",
    "keep_best",
    "make_method",
    "make_methods",
    "method_class",
    "minimum_counts",
    "untrained_methods",
]


def __getattr__(name: str) -> Any:
    """Find a function by its former name."""
    if name == "least_counts":
        what = "least_counts is called minimum_counts now."
        warnings.warn(what, DeprecationWarning, stacklevel=2)
        return minimum_counts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
