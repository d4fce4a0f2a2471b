"""SparseVLM stated plainly, one sample and one token at a time, on the plain model.

Nothing here knows how the package does it. Attention is read from the full maps of the plain model,
which carries the sums of recycled tokens in place of the centres' hidden states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.helpers.inputs import Inputs, real_mask, visual_mask
from tests.helpers.oracle import attention_maps
from tests.helpers.tiny import decoder_layers


@dataclass
class Pruned:
    """What SparseVLM does to one batch.

    Attributes:
        kept: pruning layer -> (B, L) bool, text kept and padding not.
        edits: pruning layer -> [(sample, centre, members)].
        clusters: how many clusters there are in all.
    """

    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    edits: dict[int, list[tuple[int, int, list[int]]]] = field(default_factory=dict)

    @property
    def clusters(self) -> int:
        return sum(len(edits) for edits in self.edits.values())


def rated(visual: np.ndarray, text: np.ndarray) -> list[bool]:
    """Which of the (T, D) text tokens the (V, D) visual tokens speak of."""
    relevance = np.zeros(len(text))
    for v in visual:
        logits = np.array([float(v @ t) for t in text])
        shares = np.exp(logits - logits.max())
        relevance += shares / shares.sum()
    relevance /= len(visual)
    return [bool(r >= relevance.mean()) for r in relevance]


def clustered(x: np.ndarray, count: int, neighbours: int) -> dict[int, list[int]]:
    """Centre -> its members, of (P, D) tokens in ``count`` clusters."""
    size, width = x.shape
    apart = np.array([[np.sqrt(((a - b) ** 2).sum() / width) for b in x] for a in x])
    density = []
    for i in range(size):
        near = sorted(apart[i, j] for j in range(size) if j != i)[:neighbours]
        density.append(-float(np.mean(np.square(near))) if near else 0.0)
    scores = []
    for i in range(size):
        denser = [j for j in range(size) if (density[j], -j) > (density[i], -i)]
        delta = min((apart[i, j] for j in denser), default=apart[i].max())
        scores.append(density[i] + (math.log(delta) if delta > 0 else -math.inf))
    order = sorted(range(size), key=lambda i: (-scores[i], i))
    centres = sorted(order[:count])
    groups: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in range(size):
        home = i if i in groups else min(centres, key=lambda c: apart[i, c])
        groups[home].append(i)
    return groups


def split(left: int, count: int, tau: float, theta: float) -> tuple[int, int]:
    """(tokens kept as they are, clusters) where ``count`` of ``left`` are to stay."""
    clusters = round(tau * theta / (1 - tau * theta) * (left - count))
    clusters = max(min(clusters, count // 2, count - 1), 0)
    return count - clusters, clusters


def with_edits(model: PreTrainedModel, pruned: Pruned, *, mean: bool = False) -> PreTrainedModel:
    """A copy of the plain model whose centres carry the sums of their members."""
    model = copy.deepcopy(model)
    for layer, edits in pruned.edits.items():

        def edit(_: Any, args: Any, kwargs: Any, edits: Any = tuple(edits)) -> Any:
            hidden = args[0].clone()
            for b, centre, members in edits:
                states = args[0][b, members]
                hidden[b, centre] = states.mean(0) if mean else states.sum(0)
            return (hidden, *args[1:]), kwargs

        decoder_layers(model)[layer].register_forward_pre_hook(edit, with_kwargs=True)
    return model


def sparse_choice(
    model: PreTrainedModel,
    inputs: Inputs,
    layers: Sequence[int],
    counts: Sequence[Sequence[int]] | None,
    *,
    scale: float = 0.8,
    tolerance: float = 1e-3,
    tau: float = 0.3,
    theta: float = 0.1,
    neighbours: int = 5,
    mean: bool = False,
) -> Pruned:
    """What SparseVLM does at each layer, greedily; ``counts`` of a budget, or None."""
    visual, real = visual_mask(inputs), real_mask(inputs)
    pruned = Pruned()
    alive = real.clone()
    embeds = None
    for step, layer in enumerate(layers):
        maps = attention_maps(with_edits(model, pruned, mean=mean), inputs, pruned.kept)
        if embeds is None:
            embeds = maps.hidden_states[0].double().numpy()
        # What enters the pruning layer is what the layer before it put out.
        states = maps.hidden_states[layer].double().numpy()
        alive = alive.clone()
        pruned.edits[layer] = []
        for b in range(len(visual)):
            scored = (visual & alive)[b].nonzero().flatten().tolist()
            if not scored:
                continue
            images = visual[b].nonzero().flatten().tolist()
            text = [p for p in range(images[0], visual.shape[1]) if real[b, p] and not visual[b, p]]
            chosen = rated(embeds[b, images], embeds[b, text])
            rows = [t for t, is_rater in zip(text, chosen, strict=True) if is_rater]
            paid = maps.attentions[layer - 1][b].mean(0)[rows][:, scored].double().numpy()
            if counts is None:
                sizes = np.linalg.svd(paid, compute_uv=False)
                rank = int((sizes > tolerance * sizes[0]).sum())
                gone = min(math.floor(scale * (len(scored) - rank)), len(scored) - 1)
                stay, clusters = len(scored) - gone, round(tau * theta * gone)
            else:
                stay, clusters = split(len(scored), counts[step][b], tau, theta)
            score = paid.mean(0)
            order = sorted(range(len(scored)), key=lambda i: -score[i])
            left, goes = order[:stay], order[stay:]
            kept = {scored[i] for i in left}
            if clusters:
                pool = sorted(scored[i] for i in goes[: max(round(tau * len(goes)), clusters)])
                for c, members in clustered(states[b, pool], clusters, neighbours).items():
                    kept.add(pool[c])
                    pruned.edits[layer].append((b, pool[c], [pool[i] for i in members]))
            for place in scored:
                alive[b, place] = place in kept
        pruned.kept[layer] = alive
    return pruned
