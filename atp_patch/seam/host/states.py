"""Checking what decoder layers that keep a recurrent or convolution state cannot do."""

from __future__ import annotations

from torch import Tensor

from atp_patch.contract.errors import CacheError, UnsupportedModelError
from atp_patch.seam.host.locate import Parts


def check_padding(attended: Tensor, past: int, *, generates: bool) -> None:
    """Raise CacheError where padding would go into a state that later passes read.

    The host zeroes padding, but a state still forgets by it. That does no harm only where the state
    is empty, in front of a prompt.

    Args:
        attended: (B, L) bool on the CPU, False at padding.
        past: how many tokens of earlier turns the cache holds.
        generates: True in a call of ``generate``, whose later passes surely read the state.
    """
    if past and not bool(attended.all()):
        raise CacheError(
            "this model has layers with a recurrent or convolution state, into which padding in a "
            "later turn would go; give each sample of the batch as many tokens, or go on with one "
            "sample a batch."
        )
    if generates and not bool(attended[:, -1].all()):
        raise CacheError(
            "this model has layers with a recurrent or convolution state, into which padding "
            "behind a prompt would go; pad in front (processor.tokenizer.padding_side = 'left'), "
            "or generate with use_cache=False."
        )


def refuse_learning(parts: Parts) -> None:
    """Raise UnsupportedModelError where thresholds would learn in a model that keeps states.

    A soft mask weighs keys, and a state has none: it would hold the tokens that the mask drops.
    """
    if parts.keeps_state:
        raise UnsupportedModelError(
            "thresholds cannot learn in a model some of whose layers keep a recurrent or "
            "convolution state, because a state has no keys that a mask could weigh; learn them "
            "in a model whose layers all attend, set them by target_tokens=, or train with a "
            "method that learns nothing (fixed, fastv, sparsevlm)."
        )
