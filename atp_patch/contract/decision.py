"""What a method decides: which visual tokens are kept, and which of them take in others.

Shapes: ``B`` batch, ``L`` sequence, ``V`` visual tokens (packed, padded to the longest sample),
``T`` text rows, ``H`` heads, ``Hk`` key/value heads, ``K`` keys, ``d`` head size, ``D`` hidden
size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.checks import LOOK_AT_FEATURES, check_tensor, raise_first
from atp_patch.contract.errors import DecisionError
from atp_patch.contract.view import TokenView


@dataclass(frozen=True)
class Recycled:
    """Kept tokens that take in others: their hidden state becomes a weighted sum of hidden states.

    ``C`` is the number of such tokens in the sample that has most.

    Attributes:
        column: (B, C) int64, the kept tokens that take in others, as columns of the view's tokens.
        valid: (B, C) bool, False in padding slots.
        weight: (B, C, V) float32, the weight of each visual token's hidden state in the sum.
    """

    column: Tensor
    valid: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Decision:
    """What a method decided before one layer, or at the decoder's door.

    Attributes:
        keep: (B, V) bool, True for each of the view's visual tokens that is kept. Values in padding
            slots are ignored.
        scores: for each name, (B, V) floating point scores of the tokens; the trace shows them.
        thresholds: for each name, (B,) floating point thresholds of the samples.
        soft: (B, V) floating point mask with a gradient, 1 for a kept token and 0 for a dropped
            one. It is needed where ``view.learning`` is True.
        counted: (B, V) the same numbers as ``soft``, with the gradient that losses of the token
            count use. None means that they use the gradient of ``soft``.
        recycled: which kept tokens take in others, or None if none does.

    >>> import torch
    >>> Decision(torch.tensor([[True, False, True]])).keep.sum(1).tolist()
    [2]
    """

    keep: Tensor
    exact: InitVar[bool | None] = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    soft: Tensor | None = None
    counted: Tensor | None = None
    recycled: Recycled | None = None

    def __post_init__(self, exact: bool | None) -> None:
        """Warn about ``exact``, which is ignored: kept tokens are counted instead."""
        if exact is not None:
            warnings.warn(
                "Decision(exact=...) is no longer needed: what is kept is counted. Leave it out.",
                DeprecationWarning,
                stacklevel=3,
            )


def check_decision(decision: Any, view: TokenView, method: str) -> Decision:
    """Check that a method returned a valid decision for the tokens it saw, and return it.

    All results are read from the device at once.

    Args:
        decision: what the method returned.
        view: what the method saw.
        method: the name of the method, for the message.

    Raises:
        DecisionError: if a shape, dtype or device is wrong, a score or threshold is not finite,
            fewer tokens are kept than must be, or a token that takes in others is dropped itself.
    """
    if not isinstance(decision, Decision):
        raise DecisionError(
            f"{method}: decide() returned {type(decision).__name__}; return an atp_patch.Decision."
        )
    _check_forms(decision, view, method)
    raise_first(_wrong_values(decision, view), method, view.slot_valid)
    return decision


def _check_forms(decision: Decision, view: TokenView, method: str) -> None:
    """Check shapes, dtypes and devices; no value is read from the device."""
    batch, tokens = view.slot_valid.shape

    def check(name: str, value: Any, shape: tuple[int, ...], kind: str) -> None:
        basis = f"for the {batch} samples and up to {tokens} visual tokens of the view"
        check_tensor(f"{method}: {name}", value, shape, kind, basis, view.slot_valid)

    of_tokens = (batch, tokens)
    check("keep", decision.keep, of_tokens, "bool")
    for name in ("scores", "thresholds"):
        by_name = getattr(decision, name)
        if not isinstance(by_name, Mapping):
            raise DecisionError(
                f"{method}: {name} is {type(by_name).__name__}; give a dict of tensors by name, or "
                "leave it out."
            )
    for name, value in decision.scores.items():
        check(f"scores[{name!r}]", value, of_tokens, "floating point")
    for name, value in decision.thresholds.items():
        check(f"thresholds[{name!r}]", value, (batch,), "floating point")
    if getattr(view, "learning", False) and decision.soft is None:
        raise DecisionError(
            f"{method}: the view asks for learning, and the decision has no soft mask; return "
            "soft= with a gradient, 1 for kept tokens and 0 for dropped ones."
        )
    for name in ("soft", "counted"):
        if getattr(decision, name) is not None:
            check(name, getattr(decision, name), of_tokens, "floating point")
    recycled = decision.recycled
    if recycled is not None:
        column = recycled.column if isinstance(recycled, Recycled) else None
        if not isinstance(column, Tensor) or column.ndim != 2:
            raise DecisionError(
                f"{method}: recycled must be an atp_patch.Recycled whose column is (B, C)."
            )
        columns = (batch, column.shape[1])
        check("recycled.column", column, columns, "int64")
        check("recycled.valid", recycled.valid, columns, "bool")
        check("recycled.weight", recycled.weight, (*columns, tokens), "floating point")


def _wrong_values(decision: Decision, view: TokenView) -> dict[tuple[str, str], Tensor]:
    """Return, for each possible fault and its mend, a bool scalar on the device.

    Faults that cause others come first, so that the message names the cause.
    """
    valid, wrong = view.slot_valid, {}
    keep = decision.keep & valid
    for name, scores in decision.scores.items():
        what = f"scores[{name!r}] holds numbers that are not finite"
        wrong[what, LOOK_AT_FEATURES] = (~scores.detach().isfinite() & valid).any()
    seen = valid.any(1)
    for name, thresholds in decision.thresholds.items():
        what = f"thresholds[{name!r}] holds numbers that are not finite"
        wrong[what, LOOK_AT_FEATURES] = (~thresholds.detach().isfinite() & seen).any()
    for name in ("soft", "counted"):
        mask = getattr(decision, name)
        if mask is not None:
            what = f"{name} holds numbers that are not finite"
            wrong[what, LOOK_AT_FEATURES] = (~mask.detach().isfinite() & valid).any()
    left = valid.sum(1)
    fewer = keep.sum(1) < left.clamp(max=view.min_tokens)
    what = f"a sample keeps fewer than min_tokens={view.min_tokens} visual tokens"
    wrong[what, "keep at least the best so many (atp_patch.methods.keep_best does)"] = fewer.any()
    if view.min_tokens_per_image:
        images = max((len(grids) for grids in view.layout.grids), default=0)
        kept_of, left_of = (
            torch.zeros(len(keep), images, dtype=torch.long, device=keep.device).scatter_add_(
                1, view.image, chosen.long()
            )
            for chosen in (keep, valid)
        )
        minimum = view.min_tokens_per_image
        what = f"an image keeps fewer than min_tokens_per_image={minimum} visual tokens"
        mend = "keep the best so many of each (atp_patch.methods.keep_best does)"
        wrong[what, mend] = (kept_of < left_of.clamp(max=minimum)).any()
    recycled = decision.recycled
    if recycled is not None:
        column, width = recycled.column, valid.shape[1]
        outside = (column < 0) | (column >= width)
        what = f"recycled.column names tokens outside of the view's {width}"
        wrong[what, "give columns of keep"] = (outside & recycled.valid).any()
        inside = column.clamp(0, max(width - 1, 0))
        gone = ~keep.gather(1, inside)
        what = "recycled.column names tokens that are not kept"
        wrong[what, "only a kept token takes in others"] = (gone & recycled.valid).any()
        named = torch.zeros_like(keep, dtype=torch.long)
        named.scatter_add_(1, inside, recycled.valid.long())
        what = "recycled.column names a token twice"
        wrong[what, "give each token that takes in others one column"] = (named > 1).any()
        what = "recycled.weight holds numbers that are not finite"
        wrong[what, LOOK_AT_FEATURES] = (~recycled.weight.isfinite().all(-1) & recycled.valid).any()
    return wrong
