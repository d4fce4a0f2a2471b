"""Configs of transformers from those of other packages, which add much of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names of earlier versions, and what a class takes without having a default for it.
_ALSO = {"rope_theta", "rope_scaling", "torch_dtype", "head_dim"}
_ABOUT_THE_FILE = {"architectures", "model_type", "transformers_version", "_name_or_path"}


def config_of(make: Any, table: Mapping[str, Any]) -> Any:
    """A config of class ``make`` with what it knows of ``table``; the rest is left out."""
    known = ({*make().to_dict()} | _ALSO) - _ABOUT_THE_FILE
    return make.from_dict({key: value for key, value in table.items() if key in known})
