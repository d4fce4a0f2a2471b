"""PruMerge stated plainly, one image and one token at a time, and the plain model made to use it.

Nothing here knows how the package does it. Queries and keys are those that the tower's own
projections put out; where a token ends in the sequence is found by sending its number through the
plain model in place of its feature.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers.inputs import Inputs


@dataclass
class Group:
    """One image, tile or frame: what its tokens get and hold.

    Attributes:
        attention: (n,) float64; ``key``: (n, d); ``places``: (n, 2) row and column of each token.
    """

    attention: np.ndarray
    key: np.ndarray
    places: list[tuple[int, int]]


def fence(attention: np.ndarray) -> set[int]:
    """Indices above the upper fence, or the best one."""
    first, third = np.percentile(attention, [25, 75])
    above = {i for i, a in enumerate(attention) if a > third + 1.5 * (third - first)}
    return above or {int(np.argmax(attention))}


def merged(
    group: Group, features: np.ndarray, kept: list[int], neighbours: int
) -> dict[int, np.ndarray]:
    """Kept token -> its new feature: the weighted mean of itself and its nearest that go."""
    goes = [j for j in range(len(group.attention)) if j not in kept]
    made = {}
    for i in kept:
        likeness = {j: float(group.key[i] @ group.key[j]) for j in goes}
        nearest = sorted(goes, key=lambda j: -likeness[j])[:neighbours]
        members = [i, *nearest]
        weights = [float(group.attention[j]) for j in members]
        total = sum(weights)
        made[i] = sum(w / total * features[j] for w, j in zip(weights, members, strict=True))
    return made


def sampled(group: Group, taken: set[int], count: int) -> set[int]:
    """``count`` further tokens, each the one farthest from the centre-first walk so far.

    The walk starts at the middle of the grid, goes to the place farthest from all before it, of
    equals to the least crowded, then the first; tokens taken already are walked over.
    """
    height = 1 + max(row for row, _ in group.places)
    width = 1 + max(column for _, column in group.places)
    every = [(row, column) for row in range(height) for column in range(width)]
    number = {place: n for n, place in enumerate(group.places)}
    walk = [(height // 2, width // 2)]
    while True:
        free = [number[place] for place in walk if number[place] not in taken]
        if len(free) >= count or len(walk) == len(every):
            return set(free[:count])
        # Whole squared distances compare exactly; crowding only parts equals.
        ranked = [
            (min(_squared(p, q) for q in walk), -sum(1 / max(_squared(p, q), 1) for q in walk), -n)
            for n, p in enumerate(every)
        ]
        best = max(rank[0] for rank in ranked)
        crowd = max(rank[1] for rank in ranked if rank[0] == best)
        chosen = next(n for n, r in enumerate(ranked) if r[0] == best and r[1] >= crowd - 1e-9)
        walk.append(every[chosen])


def _squared(p: tuple[int, int], q: tuple[int, int]) -> int:
    return (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2


def chosen(group: Group, plus: bool, count: int | None) -> list[int]:
    """What a group keeps: its outliers or its best, and for PruMerge+ as many others."""
    if count is None:
        kept = fence(group.attention)
        more = len(kept)
    else:
        best = count - count // 2 if plus else count
        kept = set(np.argsort(-group.attention, kind="stable")[:best].tolist())
        more = count // 2
    return sorted(kept | sampled(group, kept, more)) if plus else sorted(kept)


def attention_of(query: Tensor, key: Tensor, class_token: bool) -> tuple[np.ndarray, np.ndarray]:
    """(n,) attention that patches get and (n, d) their keys, from one image's (H, S, d) q and k."""
    query, key = query.double(), key.double()
    lead = int(class_token)
    received = []
    shared = key.repeat_interleave(len(query) // len(key), 0)  # several query heads may share one
    for q, k in zip(query, shared, strict=True):
        rows = q[:1] if class_token else q
        logits = rows @ k[lead:].T / k.shape[1] ** 0.5
        received.append(logits.softmax(-1).mean(0))
    flat = key[:, lead:].transpose(0, 1).flatten(1)
    return torch.stack(received).mean(0).numpy(), flat.numpy()


def rows_in_sequence(model: nn.Module, projector: str, inputs: Inputs) -> list[Tensor]:
    """For each call of the projector (B, L) which of its rows stands where, -1 for none."""
    found = []
    calls = 0
    while True:
        twin = copy.deepcopy(model)
        number = 0

        def count(_: nn.Module, __: Any, output: Tensor, wanted: int = calls) -> Tensor:
            nonlocal number
            flat = torch.zeros_like(output).flatten(0, -2)
            if number == wanted:
                flat[:, 0] = torch.arange(1, len(flat) + 1)
                flat[:, 1] = 1e6
            number += 1
            return flat.reshape(output.shape)

        seen: list[Tensor] = []
        twin.model.get_submodule(projector).register_forward_hook(count)
        twin.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"]),
            with_kwargs=True,
        )
        with torch.no_grad():
            twin(**inputs)
        if calls >= number:
            return found
        marked = seen[0][..., 1] == 1e6
        found.append(torch.where(marked, seen[0][..., 0].round().long() - 1, -1))
        calls += 1


@contextmanager
def replaced(
    model: nn.Module, projector: str, features: list[Tensor], *, inputs: bool
) -> Iterator[nn.Module]:
    """A copy of the plain model whose projector is given, or gives, these features in turn."""
    twin = copy.deepcopy(model)
    turn = iter(features)
    module = twin.model.get_submodule(projector)
    if inputs:
        module.register_forward_pre_hook(lambda _, args: (next(turn), *args[1:]))
    else:
        module.register_forward_hook(lambda *_: next(turn))
    yield twin
