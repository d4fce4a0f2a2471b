"""The names of the built-in models."""

from __future__ import annotations

LLAVA, DYNAMIC = "llava", "dynamic"
NAMES: dict[str, str] = {"builtin": LLAVA, "builtin-dynamic": DYNAMIC}
"""The name of each built-in model, by what commands call it."""
