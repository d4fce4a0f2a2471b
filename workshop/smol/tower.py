"""The tower and the projector of the third built-in model, and their forward pass in training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Mistral3Config, PixtralVisionConfig, PixtralVisionModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from atp_patch.builtin.scenes import PATCH_PX
from workshop.forward import attend, heads_apart, heads_together

HIDDEN, LAYERS, HEADS = 192, 5, 6
MERGE = 2
"""A visual token is made from MERGE x MERGE patches."""
MOST_PX = 448
"""Longest side of a picture."""
_CONSTANT = 7.0
"""Size of the first channel after the first norm; the squares of all channels sum to HIDDEN."""
_OFFSETS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, 1)),
    ((0, -2), (0, 2), (-2, 0), (2, 0), (-1, 1), (1, -1)),
)
"""For each of the first layers and each head, the (rows, columns) to the patch that it sees."""

_SHARPNESS = 8.0
"""Score of a rotation that matches, of the heads that see a neighbour at first."""


def vision_config() -> PixtralVisionConfig:
    """Make the configuration of the tower."""
    return PixtralVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        hidden_act="silu",
        image_size=MOST_PX,
        patch_size=PATCH_PX,
        rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
    )


def build_tower() -> PixtralVisionModel:
    """Make an untrained tower whose first two layers see a patch's neighbours.

    A tower without position table learns slowly to look at neighbours. So the first channel holds
    the brightness of a patch, and from it each head of the first two layers makes queries and keys
    that match at one offset.
    """
    tower = PixtralVisionModel(vision_config())
    rotations = tower.patch_positional_embedding.inv_freq
    with torch.no_grad():
        weight = tower.patch_conv.weight
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        weight[0] = _CONSTANT / weight[0].numel()
        for layer, offsets in zip(tower.transformer.layers, _OFFSETS, strict=False):
            attention = layer.attention
            for head, offset in enumerate(offsets):
                _look_at(attention.q_proj, attention.k_proj, rotations, head, offset)
    return tower


def _look_at(
    queries: nn.Linear, keys: nn.Linear, rotations: Tensor, head: int, offset: tuple[int, int]
) -> None:
    """Make a head attend to the patch at an offset of (rows, columns)."""
    half = len(rotations)
    rows, columns = rotations.chunk(2)
    turn = torch.cat([rows * offset[0], columns * offset[1]])
    # A score is scale * constant^2 * size^2 * (the sum of the cosines of all rotations).
    size = (_SHARPNESS * math.sqrt(2 * half)) ** 0.5 / _CONSTANT
    start = head * 2 * half
    for module in (queries, keys):
        module.weight[start : start + 2 * half] *= 0.3
    queries.weight[start : start + half, 0] = size
    queries.weight[start + half : start + 2 * half, 0] = 0.0
    keys.weight[start : start + half, 0] = size * turn.cos()
    keys.weight[start + half : start + 2 * half, 0] = -size * turn.sin()


def tower_forward(tower: PixtralVisionModel, pixel_values: Tensor) -> Tensor:
    """(pictures, patches, hidden): the patches' features; all pictures have the same size.

    It equals the tower's own forward, which takes one row of pictures and masks them apart.

    Args:
        tower: the tower.
        pixel_values: (pictures, 3, height, width).
    """
    size = tower.config.patch_size
    rows, columns = (side // size for side in pixel_values.shape[-2:])
    patches = functional.unfold(pixel_values, size, stride=size).mT
    return layers_forward(tower, patches, *turns(tower, rows, columns))


def turns(tower: PixtralVisionModel, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(patches, head dim) each: cosines and sines of the positions of a grid of patches."""
    weight = tower.patch_conv.weight
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(weight.device)
    cos, sin = tower.patch_positional_embedding(at.float(), at)
    return cos.to(weight), sin.to(weight)


def layers_forward(tower: PixtralVisionModel, patches: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(pictures, patches, hidden): the patches' features.

    Args:
        tower: the tower.
        patches: (pictures, patches, 3 * patch pixels), ordered by channel, row and column.
        cos, sin: from `turns`.
    """
    x = _norm(patches @ tower.patch_conv.weight.flatten(1).mT, tower.ln_pre)
    for layer in tower.transformer.layers:
        attention = layer.attention
        normed = _norm(x, layer.attention_norm)
        q, k, v = (
            heads_apart(p(normed), attention.num_heads)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        seen = attend(q, k, v)
        x = x + attention.o_proj(heads_together(seen))
        normed = _norm(x, layer.ffn_norm)
        mlp = layer.feed_forward
        x = x + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return x


def _norm(x: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


def build_projector(config: Mistral3Config) -> Mistral3MultiModalProjector:
    """Make an untrained projector."""
    return Mistral3MultiModalProjector(config)


def projector_forward(
    projector: Mistral3MultiModalProjector, features: Tensor, rows: int, columns: int
) -> Tensor:
    """(pictures, tokens, decoder's hidden): the visual tokens; all pictures have the same size.

    Args:
        projector: the projector.
        features: (pictures, rows * columns, hidden), from `tower_forward`.
        rows, columns: number of rows and columns of patches.
    """
    x = _norm(features, projector.norm)
    x = x.unflatten(1, (rows // MERGE, MERGE, columns // MERGE, MERGE))
    # The merger's inputs are ordered by channel, then by patch.
    x = x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
    x = projector.linear_1(projector.patch_merger.merging_layer(x))
    merged: Tensor = projector.linear_2(projector.act(x))
    return merged
