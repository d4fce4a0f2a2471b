"""Real model shapes with random weights: what a benchmark needs of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

_IMAGE_TOKEN = 32000


@dataclass(frozen=True)
class Preset:
    """A LLaVA-1.5 shape: decoder sizes and 24 x 24 visual tokens.

    The vision tower is a stub of one narrow layer, so that what is timed is the decoder.
    """

    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    grid: int = 24
    vocab_size: int = 32064

    def build(self, decoder_layers: int | None, attention: str) -> nn.Module:
        """A model of this shape with random weights, on the CPU in float32.

        Args:
            decoder_layers: fewer layers than the shape has, for small machines; None for all.
            attention: "sdpa", "eager" or "flash_attention_2".
        """
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=self.grid * 14,
            patch_size=14,
        )
        text = LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.mlp_size,
            num_hidden_layers=decoder_layers or self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=4096,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=_IMAGE_TOKEN,
            vision_feature_layer=-1,
            image_seq_length=self.grid**2,
        )
        config._attn_implementation = attention
        return LlavaForConditionalGeneration(config).eval()

    def inputs(self, batch_size: int, prompt_tokens: int, seed: int) -> dict[str, Tensor]:
        """One image and ``prompt_tokens`` text tokens a sample, a tenth of them before the
        image.
        """
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(3, _IMAGE_TOKEN, (batch_size, prompt_tokens), generator=generator)
        before = prompt_tokens // 10
        image = torch.full((batch_size, self.grid**2), _IMAGE_TOKEN)
        ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
        side = self.grid * 14
        pixels = torch.randn(batch_size, 3, side, side, generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels,
        }


PRESETS: dict[str, Preset] = {
    "llava-1.5-7b": Preset(4096, 11008, 32, 32, 32),
    "llava-1.5-13b": Preset(5120, 13824, 40, 40, 40),
    # The smallest shape of the same family, for trying the command out.
    "tiny": Preset(256, 688, 8, 4, 4),
}


def describe(model: Any) -> str:
    """One line on a model's decoder."""
    text = model.config.get_text_config()
    return (
        f"{text.num_hidden_layers} decoder layers, hidden size {text.hidden_size}, MLP "
        f"{text.intermediate_size}, {text.num_attention_heads} heads, attention "
        f"{text._attn_implementation}"
    )
