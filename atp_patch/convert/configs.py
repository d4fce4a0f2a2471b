"""Configurations of transformers, made from those of other packages, which hold more than these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names from earlier versions, and names that a class takes although it has no default for them.
_ALSO = {"rope_theta", "rope_scaling", "torch_dtype", "head_dim"}
_ABOUT_THE_FILE = {"architectures", "model_type", "transformers_version", "_name_or_path"}


def config_of(make: Any, table: Mapping[str, Any]) -> Any:
    """Make a configuration from those entries of a table that its class knows.

    Args:
        make: the class of the configuration.
        table: entries of another package's config.json.
    """
    known = ({*make().to_dict()} | _ALSO) - _ABOUT_THE_FILE
    return make.from_dict({key: value for key, value in table.items() if key in known})
