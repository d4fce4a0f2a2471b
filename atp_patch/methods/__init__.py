"""The methods, one in each file: each chooses from what it sees which tokens to keep."""

from __future__ import annotations

from atp_patch.contract import (
    DoorMethod,
    LayerMethod,
    Method,
    ModuleSpec,
    PictureMethod,
    TowerMethod,
)
from atp_patch.methods.atp import ATP
from atp_patch.methods.base import attention_paid, keep_best, least_counts
from atp_patch.methods.downsample import Downsample
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
from atp_patch.methods.sparsevlm import SparseVLM
from atp_patch.methods.voco import VoCo

__all__ = [
    "ATP",
    "METHODS",
    "DoorMethod",
    "Downsample",
    "FastV",
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
    "VoCo",
    "attention_paid",
    "available_methods",
    "keep_best",
    "least_counts",
    "make_method",
    "make_methods",
    "method_class",
    "untrained_methods",
]
