"""How a budget is divided before the decoder among groups: images, tiles or frames."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from atp_patch.contract import DoorMethod, Quota, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.maths import even_counts
from atp_patch.patching.config import DEFAULT_SHARE, PruningConfig

_ENTERING = 3  # in a pair, tokens that enter for each that is left behind the first pruning layer


def quotas(
    config: PruningConfig,
    tokens: Sequence[int],
    placeholders: Sequence[int],
    kinds: Sequence[Sequence[int]],
) -> tuple[Quota, ...]:
    """Return how many tokens each group keeps on the vision tower.

    A group keeps the share ``keep`` or ``target_share`` of its tokens, or its part of its sample's
    ``target_tokens``.

    Args:
        config: the configuration with the budget.
        tokens: number of prunable tokens in each group, sample by sample.
        placeholders: number of placeholders of each group.
        kinds: for each kind of placeholder (image, video), how many each sample has; the likeliest
            kind comes first.

    Raises:
        InputError: if the groups match the placeholders of no kind.
    """
    share = config.target_share if config.keep is None else config.keep[0]
    if share is not None:
        minimums = [min(group_minimum(config), n) for n in tokens]
        shares = [round(share * n) for n in tokens]
        return tuple(Quota(max(pair), pair[1]) for pair in zip(shares, minimums, strict=True))
    if not any(sum(of_samples) == sum(placeholders) for of_samples in kinds):
        raise InputError(
            "target_tokens is divided by the placeholders in input_ids, which are not those of "
            "these images; pass input_ids and pixel values of the same prompts, or give keep=."
        )
    totals = [sum(sample) for sample in zip(*kinds, strict=True)]
    for of_samples in kinds:
        split = _split(placeholders, of_samples)
        if split is not None:
            return _shared_out(config, tokens, placeholders, totals, split)
    raise InputError(
        "images and placeholders do not match sample by sample, so target_tokens cannot be "
        "divided among the images; give keep=."
    )


def door_counts(
    config: PruningConfig, method: DoorMethod, grids: Sequence[Sequence[VisualGrid]]
) -> tuple[int, ...] | None:
    """Return how many visual tokens of each sample a door method keeps, or None if it decides.

    A door method that is used alone has the budget that was given. In a pair the budget belongs to
    the layer method, and the door method keeps its own ``share``. If it has none, it keeps the
    first share of ``keep``, or so many tokens that a third of them are left on average behind the
    first pruning layer.

    Args:
        config: the configuration with the budget.
        method: the door method.
        grids: for each sample, its grids.
    """
    share, target = method.share, None
    alone = config.method is None
    follows = not alone and share is None and method.needs_budget
    if follows or (alone and config.has_budget and method.takes_budget):
        share = config.target_share if config.keep is None else config.keep[0]
        target = config.target_tokens
    if share is None and target is None and method.needs_budget:
        share = DEFAULT_SHARE
    if follows and config.keep is None:
        full = config.layers[0] / config.base.num_layers
        entering = 1 / (full + (1 - full) / _ENTERING)  # for one token on average over all layers
        share = None if share is None else share * entering
        target = None if target is None else target * entering
    if share is None and target is None:
        return None
    found = []
    for sample in grids:
        total = sum(grid.length for grid in sample)
        wanted = round(share * total) if share is not None else round(target or 0)
        minimum = max(config.min_tokens, len(sample) * config.min_tokens_per_image)
        found.append(min(max(wanted, minimum), total))
    return tuple(found)


def group_minimum(config: PruningConfig) -> int:
    """Return the number of tokens that each group keeps at least if its sample is not known."""
    return max(config.min_tokens, config.min_tokens_per_image)


def _split(placeholders: Sequence[int], of_samples: Sequence[int]) -> list[slice] | None:
    """Find the groups of each sample, or return None if they do not match the placeholders.

    Args:
        placeholders: number of placeholders of each group.
        of_samples: number of placeholders of each sample.
    """
    found, at = [], 0
    for wanted in of_samples:
        stop, filled = at, 0
        while filled < wanted and stop < len(placeholders):
            filled += placeholders[stop]
            stop += 1
        if filled != wanted:
            return None
        found.append(slice(at, stop))
        at = stop
    return found if at == len(placeholders) else None


def _shared_out(
    config: PruningConfig,
    tokens: Sequence[int],
    placeholders: Sequence[int],
    totals: Sequence[int],
    split: Sequence[slice],
) -> tuple[Quota, ...]:
    """Divide ``target_tokens`` and ``min_tokens`` among a sample's groups in proportion to size."""
    found: list[Quota] = []
    for total, groups in zip(totals, split, strict=True):
        sizes = list(tokens[groups])
        if not sizes:
            continue
        here = sum(placeholders[groups]) / total
        each = max(config.min_tokens_per_image, min(config.min_tokens, 1))
        minimums = even_counts(ceil(config.min_tokens * here), sizes, each)
        goal = DEFAULT_SHARE * sum(sizes)
        if config.target_tokens is not None:
            goal = config.target_tokens * here
        counts = even_counts(max(round(goal), sum(minimums)), sizes, each)
        found += [Quota(max(pair), pair[1]) for pair in zip(counts, minimums, strict=True)]
    return tuple(found)
