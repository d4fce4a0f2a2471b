"""The former home of :func:`atp_patch.load_trained`, which cards of older adapters name."""

from __future__ import annotations

import warnings

from atp_patch.tools.trained import Trained, find_trained, load_trained, merged, shipped

__all__ = ["Trained", "find_trained", "load_trained", "merged", "shipped"]

warnings.warn(
    "atp_patch.trained has moved: write `from atp_patch import load_trained`.",
    DeprecationWarning,
    stacklevel=2,
)
