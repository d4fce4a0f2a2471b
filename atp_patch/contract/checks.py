"""What the checks of all answers of methods share: forms first, then values, all read at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.errors import DecisionError

LOOK_AT_FEATURES = (
    "look for NaN or infinity in the model's weights, in the pixel values, or in the method"
)


def check_tensor(
    where: str, value: Any, shape: tuple[int, ...], kind: str, basis: str, like: Tensor
) -> None:
    """Check the type, shape, dtype and device of a tensor; none of its values is read.

    Args:
        where: the name of the method and of the tensor, for the message.
        value: what the method gave.
        shape: the shape that it must have.
        kind: "bool", "int64", "float32" or "floating point".
        basis: what the shape follows from, for the message.
        like: a tensor on the device that it must be on.

    Raises:
        DecisionError: if one of them is wrong.
    """
    if not isinstance(value, Tensor):
        raise DecisionError(f"{where} is {type(value).__name__}; give a tensor.")
    is_kind = {
        "bool": value.dtype == torch.bool,
        "int64": value.dtype == torch.int64,
        "float32": value.dtype == torch.float32,
        "floating point": value.is_floating_point(),
    }
    if tuple(value.shape) != shape or not is_kind[kind]:
        raise DecisionError(
            f"{where} is {tuple(value.shape)} {value.dtype}; it must be {shape} {kind}, {basis}."
        )
    if value.device != like.device:
        raise DecisionError(
            f"{where} is on {value.device}, the tokens on {like.device}; move it there."
        )


def raise_first(wrong: Mapping[tuple[str, str], Tensor], method: str, like: Tensor) -> None:
    """Raise the first of some possible faults that has happened.

    All of them are read from the device at once.

    Args:
        wrong: for each fault and its mend, a bool scalar.
        method: the name of the method, for the message.
        like: a tensor on the device where the scalars are gathered.

    Raises:
        DecisionError: if one of the scalars is True.
    """
    found = torch.stack([value.to(like.device) for value in wrong.values()]).tolist()
    for (what, mend), is_wrong in zip(wrong, found, strict=True):
        if is_wrong:
            raise DecisionError(f"{method}: {what}; {mend}.")
