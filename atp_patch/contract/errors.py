"""All error classes of the package. Every message says what was wrong, where, and the mend."""

from __future__ import annotations


class ATPError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(ATPError, ValueError):
    """An argument or a configuration file is wrong."""


class BudgetError(ConfigError):
    """The token budget cannot be met; the message names the smallest possible one."""


class UnsupportedModelError(ATPError, ValueError):
    """The model, or what it is asked to do while patched, is not supported."""


class NotPatchedError(ATPError, ValueError):
    """The call needs a patched model."""


class WeightsError(ATPError, ValueError):
    """Adapter files are missing, empty, foreign, or made for another base model."""


class HubError(ATPError, OSError):
    """The Hugging Face Hub could not be reached, or refused the request."""


class OtherBaseWarning(UserWarning):
    """An adapter is loaded into another checkpoint, of the same shapes, than it was made for."""


class UnsupportedVersionWarning(UserWarning):
    """Python, torch or transformers is older or newer than the versions that are tested."""


class CacheError(ATPError, ValueError):
    """The key/value cache cannot hold pruned layers, or cannot do what was requested."""


class InputError(ATPError, ValueError):
    """The inputs of a forward pass do not say what pruning needs to know."""


class DecisionError(ATPError):
    """A method returned a decision, merge or grid that is not valid for the tokens that it saw."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
