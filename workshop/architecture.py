"""The first model's shape and initial weights, and its growth from 8 to 32 decoder layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atp_patch.builtin.scenes import GRID, IMAGE_PX, PATCH_PX
from atp_patch.builtin.tokens import BOS, EOS, IMAGE, PAD, VOCABULARY_SIZE, word_ids

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

HIDDEN = 128
HEADS = 4
TOWER_LAYERS = 4
DECODER_LAYERS = 32
ORIGINALS: tuple[int, ...] = (0, 3, 6, 9, 13, 18, 23, 28)
"""The number in the deep model of each layer of the shallow one. The attention of layers 3, 13 and
23 is scored before layers 4, 14 and 24."""
NOUN_ORIGINAL = 4
"""The output of this layer (13 of 32) is trained to show what nouns refer to."""
GAZING_ORIGINALS: tuple[int, int] = (3, 4)
"""In these layers half of the heads are trained where to attend: a noun to what it names, and the
token before a sign's character to that character."""
SIDE_ORIGINAL = 5
"""In this layer (18 of 32) half of the heads are trained to attend from a question's second noun to
its first. The layer's output is trained to show on which side of the first object the second one
is. Both
objects have been found one layer earlier."""
HOLDS_ORIGINAL = 6
"""The output of this layer (23 of 32) is trained to show at the second noun whether the relation
holds."""

_POSITION_DIMS = 32
_HEAD_OFFSETS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((-3, 0), (3, 0), (0, -3), (0, 3)),
    ((-2, -2), (-2, 2), (2, -2), (2, 2)),
)
"""The offset (rows, columns) to which each tower head attends at the start of training."""


def build(layers: int) -> LlavaForConditionalGeneration:
    """Make an untrained float32 model with `layers` decoder layers from torch's random numbers."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    ids = word_ids()
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        projection_dim=HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=False,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    _start_decoder(model)
    _start_tower(model)
    return model


@torch.no_grad()
def _start_decoder(model: LlavaForConditionalGeneration) -> None:
    decoder = model.model.language_model
    for layer in decoder.layers:
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.2)
    decoder.embed_tokens.weight.normal_(std=0.5)
    model.lm_head.weight.normal_(std=0.02)
    for linear in (model.model.multi_modal_projector.linear_1,):
        linear.weight.normal_(std=HIDDEN**-0.5)
    model.model.multi_modal_projector.linear_2.weight.normal_(std=HIDDEN**-0.5)


def position_features() -> Tensor:
    """(576, 32) cosines and sines of each patch's row and column; those of neighbours correlate."""
    turns = torch.arange(1, 16, 2) * math.pi / GRID  # (8,)
    angles = torch.arange(GRID)[:, None] * turns  # (24, 8)
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (24, 16)
    rows = waves[:, None].expand(GRID, GRID, 16)
    columns = waves[None, :].expand(GRID, GRID, 16)
    return torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, _POSITION_DIMS)


@torch.no_grad()
def _start_tower(model: LlavaForConditionalGeneration) -> None:
    """Let each head of the tower start by attending in one direction.

    Otherwise a tower of this size would need most of its short training to learn which patches are
    neighbours. Position features are in the first 32 channels. The query and the key of each head
    start as copies of them, and the query is rotated by the head's offset.
    """
    tower = model.model.vision_tower
    position = tower.embeddings.position_embedding.weight
    position.zero_()
    position[1:, :_POSITION_DIMS] = position_features()
    patch = tower.embeddings.patch_embedding.weight
    patch.normal_(std=1.5 * (3 * PATCH_PX * PATCH_PX) ** -0.5)
    patch[:_POSITION_DIMS] = 0
    tower.embeddings.class_embedding.normal_(std=0.5)
    tower.embeddings.class_embedding[:_POSITION_DIMS] = 0
    size = HIDDEN // HEADS
    gain = 1.6
    for layer, offsets in zip(tower.encoder.layers, _HEAD_OFFSETS, strict=True):
        attention = layer.self_attn
        for linear in (attention.v_proj, layer.mlp.fc1):
            linear.weight.normal_(std=HIDDEN**-0.5)
        attention.out_proj.weight.normal_(std=0.5 * HIDDEN**-0.5)
        layer.mlp.fc2.weight.normal_(std=0.3 * (2 * HIDDEN) ** -0.5)
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.normal_(std=0.1 * HIDDEN**-0.5)
        for head, offset in enumerate(offsets):
            rows = slice(head * size, (head + 1) * size)
            attention.k_proj.weight[rows, :_POSITION_DIMS] += gain * torch.eye(size)
            attention.q_proj.weight[rows, :_POSITION_DIMS] += gain * _turn(offset)


def _turn(offset: tuple[int, int]) -> Tensor:
    """(32, 32) matrix that moves position features by (rows, columns)."""
    turns = torch.arange(1, 16, 2) * math.pi / GRID
    blocks = []
    for steps in offset:
        cos, sin = torch.diag((steps * turns).cos()), torch.diag((steps * turns).sin())
        blocks.append(torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0))
    return torch.block_diag(*blocks)


@torch.no_grad()
def recentre(model: LlavaForConditionalGeneration, features: Tensor) -> None:
    """Give the projector's output mean 0 and root mean square 1, in place.

    A part that all visual tokens share carries no information, but would dominate the output of the
    decoder's norms.

    Args:
        model: the model.
        features: (images, 576, hidden), the tower's features of some images.
    """
    projector = model.model.multi_modal_projector
    shown = projector(features).flatten(0, 1)
    mean = shown.mean(0)
    scale = (shown - mean).square().mean().rsqrt()
    projector.linear_2.weight.mul_(scale)
    projector.linear_2.bias.sub_(mean).mul_(scale)


@torch.no_grad()
def grow(shallow: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Make a model with 32 decoder layers that computes the same function.

    Layer ORIGINALS[k] of the deep model is layer k of the shallow one. Each layer in between is a
    copy of the nearest such layer below it with zeros in `o_proj` and `down_proj`, so that it adds
    nothing to the residual stream until it is trained.
    """
    deep = build(DECODER_LAYERS)
    state = shallow.state_dict()
    grown = {k: v for k, v in state.items() if ".language_model.layers." not in k}
    stem = "model.language_model.layers."
    for target in range(DECODER_LAYERS):
        source = max(k for k, at in enumerate(ORIGINALS) if at <= target)
        for name, value in state.items():
            if name.startswith(f"{stem}{source}."):
                rest = name[len(f"{stem}{source}.") :]
                silent = target not in ORIGINALS and ("o_proj" in rest or "down_proj" in rest)
                grown[f"{stem}{target}.{rest}"] = torch.zeros_like(value) if silent else value
    deep.load_state_dict(grown)
    return deep
