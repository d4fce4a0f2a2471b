"""How a budget is shared out before the decoder, to groups: images, tiles or frames."""

from __future__ import annotations

from collections.abc import Sequence

from atp_patch.config import DEFAULT_SHARE, PruningConfig
from atp_patch.errors import InputError
from atp_patch.maths import even_counts


def group_counts(
    config: PruningConfig,
    tokens: Sequence[int],
    places: Sequence[int],
    kinds: Sequence[Sequence[int]],
) -> tuple[int, ...]:
    """How many tokens each group keeps: a share of its own, or of its sample's ``target_tokens``.

    Args:
        tokens: prunable tokens of each group, sample by sample; ``places``: its placeholders.
        kinds: of each kind (image, video), the placeholders in each sample; the likeliest first.

    Raises:
        InputError: where no kind has these placeholders, sample by sample.
    """
    if config.keep is not None:
        (share,) = config.keep
        least = least_of_group(config)
        return tuple(max(min(least, n), round(share * n)) for n in tokens)
    if not any(sum(placed) == sum(places) for placed in kinds):
        raise InputError(
            "target_tokens is shared out by the placeholders in input_ids, which are not those of "
            "these images; pass input_ids and pixel values of the same prompts, or give keep=."
        )
    totals = [sum(sample) for sample in zip(*kinds, strict=True)]
    for placed in kinds:
        split = _split(places, placed)
        if split is not None:
            return _shared_out(config, tokens, places, totals, split)
    raise InputError(
        "images and placeholders do not match sample by sample, so target_tokens cannot be shared "
        "out; give keep=."
    )


def least_of_group(config: PruningConfig) -> int:
    """Tokens that each group keeps at least.

    ``min_tokens`` are a sample's, and shared out with ``target_tokens``. Otherwise nothing says
    which groups are one sample's, and each group keeps them.
    """
    shared = config.target_tokens is not None
    least = min(config.min_tokens, 1) if shared else config.min_tokens
    return max(least, config.min_tokens_per_image)


def _split(places: Sequence[int], placed: Sequence[int]) -> list[slice] | None:
    """Which groups are each sample's; None where they do not fit its placeholders."""
    found, at = [], 0
    for wanted in placed:
        stop, filled = at, 0
        while filled < wanted and stop < len(places):
            filled += places[stop]
            stop += 1
        if filled != wanted:
            return None
        found.append(slice(at, stop))
        at = stop
    return found if at == len(places) else None


def _shared_out(
    config: PruningConfig,
    tokens: Sequence[int],
    places: Sequence[int],
    totals: Sequence[int],
    split: Sequence[slice],
) -> tuple[int, ...]:
    counts: list[int] = []
    for total, groups in zip(totals, split, strict=True):
        sizes = list(tokens[groups])
        if not sizes:
            continue
        goal = DEFAULT_SHARE * sum(sizes)
        if config.target_tokens is not None:
            target = max(config.target_tokens, config.min_tokens)
            goal = target * sum(places[groups]) / total
        counts += even_counts(round(goal), sizes, least_of_group(config))
    return tuple(counts)
