"""How many visual tokens to keep after each pruning layer, in plain Python numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# ATP-LLaVA keeps [126, 88, 20] tokens after layers [4, 14, 24], which are 144 on average.
_PAPER_COUNTS = (126.0, 88.0, 20.0)


def paper_proportions(layers: int) -> tuple[float, ...]:
    """Return the paper's counts relative to the first, resampled to a number of pruning layers."""
    if layers == 1:
        return (1.0,)
    last = len(_PAPER_COUNTS) - 1
    shares = []
    for j in range(layers):
        place = j * last / (layers - 1)
        left = min(int(place), last - 1)
        low, high = _PAPER_COUNTS[left], _PAPER_COUNTS[left + 1]
        shares.append((low + (high - low) * (place - left)) / _PAPER_COUNTS[0])
    return tuple(shares)


def average_tokens(
    total: float, counts: Sequence[float], layers: Sequence[int], num_layers: int
) -> float:
    """Return visual tokens averaged over all decoder layers (Nbar of eq. 13).

    >>> average_tokens(576, [126, 88, 20], [4, 14, 24], 32)
    143.875
    """
    ends = [*layers[1:], num_layers]
    spans = (end - start for start, end in zip(layers, ends, strict=True))
    kept = sum(span * count for span, count in zip(spans, counts, strict=True))
    return (layers[0] * total + kept) / num_layers


def minimum_target(total: int, layers: Sequence[int], num_layers: int, minimum: int = 1) -> float:
    """Return the smallest possible average: all tokens before the first pruning, ``minimum`` after
    it.
    """
    return average_tokens(total, [min(minimum, total)] * len(layers), layers, num_layers)


def target_counts(
    total: int,
    layers: Sequence[int],
    num_layers: int,
    target: float,
    proportions: Sequence[float] | None = None,
    minimum: int = 1,
) -> tuple[int, ...]:
    """Return counts after each pruning layer whose average over all layers is ``target``.

    Args:
        total: how many visual tokens there are before pruning.
        layers: the pruning layers.
        num_layers: how many layers the decoder has.
        target: visual tokens on average over all decoder layers.
        proportions: the proportions of the counts to each other, on any scale; by default those of
            the paper.
        minimum: the smallest value of each count.

    Returns:
        Integers from ``minimum`` to ``total`` that never rise, with an average within half a token
        of the target. All are ``total`` where the target is no less.

    Raises:
        ValueError: where the target is below :func:`minimum_target`, or the proportions are not one
            positive number a layer.
    """
    shares = paper_proportions(len(layers)) if proportions is None else proportions
    if len(shares) != len(layers) or min(shares) <= 0:
        raise ValueError(
            f"proportions {tuple(shares)} are not one positive number for each of the layers "
            f"{tuple(layers)}"
        )
    shares = [share / max(shares) for share in shares]
    if target >= total:
        return (total,) * len(layers)
    lowest = minimum_target(total, layers, num_layers, minimum)
    if target < lowest:
        raise ValueError(f"target {target:g} is below the least possible average of {lowest:.1f}")

    def counts(scale: float) -> tuple[int, ...]:
        kept: list[int] = []
        for share in shares:
            kept.append(min(max(round(scale * share), minimum), kept[-1] if kept else total))
        return tuple(kept)

    def average(scale: float) -> float:
        return average_tokens(total, counts(scale), layers, num_layers)

    # The average rises with the scale in steps: of the two steps around the target take the nearer.
    # No share is above 1, so that one step of the scale changes no count by more than 1.
    step = 0.01
    scales = range(int(total / min(shares) / step) + 2)
    at = bisect_left(scales, target, key=lambda i: average(i * step))
    around = [counts(i * step) for i in (max(at - 1, 0), min(at, len(scales) - 1))]
    return min(
        around, key=lambda kept: abs(average_tokens(total, kept, layers, num_layers) - target)
    )


def starting_thresholds(
    shares: Sequence[float], spatial_share: float, lambda_sample: float
) -> list[tuple[float, float]]:
    """Return thresholds, the same for every image, that are expected to leave the given shares.

    The spatial score of the j-th of V places is ``1 - lambda_sample (j + 1) / V`` (eq. 5 with every
    rate) and never below 0, so that it can keep at most ``1 / lambda_sample`` of the places. The
    others are kept by rank, as if rank and place were independent.

    Args:
        shares: the shares of all visual tokens that are left after each pruning layer, which never
            rise.
        spatial_share: the part of each share that is kept by spatial score.
        lambda_sample: the slope of the spatial score.

    Returns:
        (theta_redundant, theta_spatial) of each pruning layer.
    """
    thetas = []
    entering = 1.0
    for share in shares:
        spatial = min(spatial_share * share, 0.95 / lambda_sample)
        rest = entering - spatial
        by_rank = 0.0 if rest <= 0 else (share - spatial) / rest
        thetas.append((1 - by_rank, 1 - lambda_sample * spatial))
        entering = share
    return thetas


def keep_counts(total: int, keep: Sequence[float], minimum: int = 1) -> tuple[int, ...]:
    """Return counts where each pruning layer keeps a share of the tokens that reached it.

    Args:
        total: how many visual tokens there are before pruning.
        keep: the share that each pruning layer keeps.
        minimum: the smallest value of each count, where as many tokens are left.
    """
    kept: list[int] = []
    for share in keep:
        left = kept[-1] if kept else total
        kept.append(max(min(minimum, left), round(share * left)))
    return tuple(kept)
