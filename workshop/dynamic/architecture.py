"""The second model's shape and initial weights, which come from the first model where they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atp_patch.builtin.dynamic.tokens import (
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    token_ids,
)
from atp_patch.builtin.scenes import GRID, PATCH_PX
from atp_patch.builtin.tokens import BOS, EOS, PAD, VOCABULARY_SIZE
from workshop.architecture import HEADS, HIDDEN, ORIGINALS, TOWER_LAYERS
from workshop.forward import decoder_forward, tower_forward

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, Qwen3VLForConditionalGeneration

DECODER_LAYERS = len(ORIGINALS)
MERGE = 2
"""A visual token is made from MERGE x MERGE patches."""
FRAMES = 2
"""An image is read as two equal frames of a video."""


def build() -> Qwen3VLForConditionalGeneration:
    """Make an untrained float32 model from torch's random numbers."""
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLTextConfig,
        Qwen3VLVisionConfig,
    )

    ids = token_ids()
    vision = Qwen3VLVisionConfig(
        depth=TOWER_LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_heads=HEADS,
        patch_size=PATCH_PX,
        spatial_merge_size=MERGE,
        temporal_patch_size=FRAMES,
        out_hidden_size=HIDDEN,
        num_position_embeddings=GRID * GRID,
        deepstack_visual_indexes=[],
    )
    text = Qwen3VLTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=False,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=False,
    )
    return Qwen3VLForConditionalGeneration(config)


@torch.no_grad()
def start_from(
    first: LlavaForConditionalGeneration, pixel_values: Tensor, ids: Tensor
) -> Qwen3VLForConditionalGeneration:
    """Make a model that starts with the first model's weights.

    The decoder gets the first model's trained layers, and the tower gets its patch embedding,
    position table, attention and MLPs. The merger starts as the first projector on the last of the
    2 x 2 patches. Other weights come from torch's random numbers.

    The second model normalises queries and keys, and it does not have the first norm of the tower.
    So their typical sizes in the first model are measured on some scenes and put into the weights.

    Args:
        first: the first model, with 8 or 32 decoder layers.
        pixel_values: (images, 3, 192, 192), pictures of scenes.
        ids: (images, questions, length), questions about them, as `decoder_forward` takes them.
    """
    model = build()
    sizes = _typical_sizes(first, pixel_values, ids)
    _copy_decoder(model, first, sizes)
    _copy_tower(model, first, sizes)
    return model


def trained_layers(first: LlavaForConditionalGeneration) -> list[nn.Module]:
    """Return the decoder layers of the first model that change the hidden states."""
    layers = list(first.model.language_model.layers)
    return layers if len(layers) == len(ORIGINALS) else [layers[k] for k in ORIGINALS]


def _copy_decoder(
    model: Qwen3VLForConditionalGeneration,
    first: LlavaForConditionalGeneration,
    sizes: dict[str, float],
) -> None:
    decoder, source = model.model.language_model, first.model.language_model
    decoder.embed_tokens.weight.copy_(source.embed_tokens.weight)
    decoder.norm.weight.copy_(source.norm.weight)
    model.lm_head.weight.copy_(first.lm_head.weight)
    for number, (layer, old) in enumerate(zip(decoder.layers, trained_layers(first), strict=True)):
        layer.load_state_dict(old.state_dict(), strict=False)
        layer.self_attn.q_norm.weight.fill_(sizes[f"{number}.q_proj"])
        layer.self_attn.k_norm.weight.fill_(sizes[f"{number}.k_proj"])


def _copy_tower(
    model: Qwen3VLForConditionalGeneration,
    first: LlavaForConditionalGeneration,
    sizes: dict[str, float],
) -> None:
    tower, old = model.model.visual, first.model.vision_tower
    norm = old.pre_layrnorm
    gain = norm.weight / sizes["embedded"]
    patch: Tensor = old.embeddings.patch_embedding.weight
    patch = (patch - patch.mean(0)) * gain[:, None, None, None]
    tower.patch_embed.proj.weight.copy_(patch[:, :, None].expand(-1, -1, FRAMES, -1, -1) / FRAMES)
    tower.patch_embed.proj.bias.copy_(norm.bias)
    places: Tensor = old.embeddings.position_embedding.weight[1:]
    tower.pos_embed.weight.copy_((places - places.mean(1, keepdim=True)) * gain)
    for block, layer in zip(tower.blocks, old.encoder.layers, strict=True):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        block.attn.qkv.weight.copy_(torch.cat([p.weight for p in parts]))
        block.attn.qkv.bias.copy_(torch.cat([p.bias for p in parts]))
        block.attn.proj.load_state_dict(attention.out_proj.state_dict())
        block.norm1.load_state_dict(layer.layer_norm1.state_dict())
        block.norm2.load_state_dict(layer.layer_norm2.state_dict())
        block.mlp.linear_fc1.load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp.linear_fc2.load_state_dict(layer.mlp.fc2.state_dict())
    projector = first.model.multi_modal_projector
    width = projector.linear_1.weight.shape[0]
    merger = tower.merger
    merger.norm.weight.fill_(sizes["features"])
    merger.linear_fc1.weight.normal_(std=0.3 * merger.linear_fc1.weight.shape[1] ** -0.5)
    merger.linear_fc1.bias.zero_()
    merger.linear_fc2.weight.zero_()
    merger.linear_fc1.weight[:width, -HIDDEN:] = projector.linear_1.weight
    merger.linear_fc1.weight[:width, :-HIDDEN] = 0
    merger.linear_fc1.bias[:width] = projector.linear_1.bias
    merger.linear_fc2.weight[:, :width] = projector.linear_2.weight
    merger.linear_fc2.bias.copy_(projector.linear_2.bias)


def _typical_sizes(
    first: LlavaForConditionalGeneration, pixel_values: Tensor, ids: Tensor
) -> dict[str, float]:
    """Measure typical sizes in the first model.

    Returns:
        The mean root mean square of a head's queries ("0.q_proj") and keys ("0.k_proj") of each
        layer, and the mean standard deviation of a patch before the tower ("embedded") and after it
        ("features").
    """
    found: dict[str, list[Tensor]] = {}
    tower = first.model.vision_tower

    def keep_heads(name: str) -> Any:
        def keep(_module: nn.Module, _args: object, out: Tensor) -> None:
            sizes = out.unflatten(-1, (HEADS, -1)).square().mean(-1).sqrt()
            found.setdefault(name, []).append(sizes.flatten())

        return keep

    def keep_embedded(_module: nn.Module, args: tuple[Tensor], _out: Tensor) -> None:
        found["embedded"] = [args[0][:, 1:].std(-1, correction=0).flatten()]

    handles = [tower.pre_layrnorm.register_forward_hook(keep_embedded)]
    for number, layer in enumerate(trained_layers(first)):
        for name in ("q_proj", "k_proj"):
            linear = getattr(layer.self_attn, name)
            handles.append(linear.register_forward_hook(keep_heads(f"{number}.{name}")))
    features = tower_forward(first, pixel_values)
    found["features"] = [features.std(-1, correction=0).flatten()]
    decoder_forward(first, features, torch.arange(GRID * GRID), ids)
    for handle in handles:
        handle.remove()
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}
