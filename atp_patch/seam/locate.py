"""Finding the parts of a loaded model, and checking that they keep the contract the seam stands
on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from atp_patch.errors import UnsupportedModelError
from atp_patch.types import DecoderShape


@dataclass
class Parts:
    """The modules that the seam hooks into.

    Attributes:
        top: what the user holds; ``base``: the model without its head, which sees images and ids;
        decoder: the module with ``.layers``.
    """

    top: Any
    base: Any
    decoder: Any
    layers: Any

    @property
    def config(self) -> Any:
        """The text config of the decoder."""
        return self.decoder.config


def decoder_shape(config: Any) -> DecoderShape:
    """Read the decoder's sizes from its text config."""
    heads = config.num_attention_heads
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
    )


def locate(model: Any) -> Parts:
    """Find base model, decoder and layers of a transformers vision-language model.

    Raises:
        UnsupportedModelError: where the model has no such parts or its layers keep another
            contract.
    """
    name = type(model).__name__
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{name} is not a transformers model; load one with "
            "AutoModelForImageTextToText.from_pretrained(...)."
        )
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or decoder is base:
        raise UnsupportedModelError(
            f"{name} has no language decoder apart from its vision model: nothing to prune. "
            "Give a vision-language model."
        )
    for idx, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None or not hasattr(attention, "config"):
            raise UnsupportedModelError(
                f"layer {idx} of {name} has no self_attn that reads its attention function from a "
                "config; linear-attention and convolution hybrids cannot be pruned."
            )
    return Parts(model, base, decoder, layers)
